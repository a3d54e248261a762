"""Derivatives in forward mode: right to the second order, and by the parameters."""

import pytest
import torch
from torch import nn
from torch.func import jvp

from lightning_vr.estimators.taylor.forward_mode import forward_mode

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
CPU = torch.device("cpu")


class Attention(nn.Module):
    """Attention over the positions of an image, whose output is not contiguous."""

    def forward(self, x):
        q = x.flatten(2).mT[:, None]
        found = nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]
        return x + found.mT.reshape(x.shape)


def points(middle):
    return nn.Sequential(nn.Linear(2, 8), middle, nn.Tanh(), nn.Linear(8, 2))


NETWORKS = {
    "layer norm": lambda: points(nn.LayerNorm(8)),
    "plain layer norm": lambda: points(nn.LayerNorm(8, elementwise_affine=False)),
    "layer norm without bias": lambda: points(nn.LayerNorm(8, bias=False)),
    "group norm": lambda: points(nn.GroupNorm(2, 8)),
    "image": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 1), Attention(), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 1, 1)
    ),
    "layer norm of images": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.LayerNorm((4, 2, 1)), nn.Tanh(), nn.Conv2d(4, 1, 1)
    ),
}


@pytest.fixture(params=NETWORKS)
def problem(request):
    torch.manual_seed(0)
    shape = (3, 1, 2, 1) if "image" in request.param else (3, 2)
    network = NETWORKS[request.param]().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network, *torch.randn(4, *shape, dtype=torch.float64)


def slope(network, u, along):
    with forward_mode(CPU):
        return jvp(network, (u,), (along,))[1]


def reverse_slope(network, u, along):
    """By two derivatives in reverse mode."""
    u, free = u.clone().requires_grad_(), torch.zeros_like(u).requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (pulled,) = torch.autograd.grad(network(u), u, free, create_graph=True)
    return torch.autograd.grad(pulled, free, along, create_graph=True)[0]


def test_first_derivatives_are_right(problem):
    network, u, v, _, _ = problem
    torch.testing.assert_close(slope(network, u, v), reverse_slope(network, u, v))


def test_second_derivatives_are_right(problem):
    network, u, v, w, _ = problem
    with forward_mode(CPU):
        found = jvp(lambda at: jvp(network, (at,), (v,))[1], (u,), (w,))[1]
    step = 1e-5
    ahead, behind = (reverse_slope(network, u + sign * step * w, v) for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


def test_derivatives_of_slopes_by_the_parameters_are_right(problem):
    """Against two derivatives in reverse mode: third ones of layer norm are wrong there too."""
    network, u, v, _, cotangent = problem
    u.requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (pulled,) = torch.autograd.grad((cotangent * network(u)).sum(), u, create_graph=True)
    scalars = (cotangent * slope(network, u.detach(), v)).sum(), (pulled * v).sum()
    options = {"allow_unused": True, "materialize_grads": True}
    found, expected = (
        torch.autograd.grad(scalar, list(network.parameters()), **options) for scalar in scalars
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast_they_are_taken_in_float32():
    network = points(nn.LayerNorm(8))
    u, v = torch.randn(2, 3, 2)
    plain = slope(network, u, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(slope(network, u, v), plain)


def test_outside_the_context_nothing_is_replaced():
    norm, x = nn.LayerNorm(8), torch.randn(3, 8)
    with forward_mode(CPU):
        inside = norm(x)
    torch.testing.assert_close(inside, norm(x))
    assert torch.equal(norm(x), torch.nn.functional.layer_norm(x, (8,), norm.weight, norm.bias))
