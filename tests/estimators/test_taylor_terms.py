"""Terms of the Taylor polynomial against Jacobians and Hessians by autograd, and quadrature."""

import itertools
import math
from dataclasses import fields, replace
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import scaled_dot_product_attention

from lightning_vr.core.rng import generator
from lightning_vr.core.types import Noised, TargetEstimate
from lightning_vr.estimators.loss import diffusion_loss, loss_weight
from lightning_vr.estimators.taylor.terms import (
    clean_points,
    constant_term,
    first_term,
    taylor_terms,
)
from lightning_vr.process.objective import Objective
from lightning_vr.process.predictions import prediction
from lightning_vr.process.schedules import Cosine
from lightning_vr.process.timesteps import Uniform
from lightning_vr.process.weightings import EDMWeighting

# torch 2.13 loads its forward-mode derivatives with it, nothing of ours
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

WIDE = torch.float64
SIGMA_DATA = 0.7

shapes = pytest.mark.parametrize("shape", [(2,), (3,), (1, 2, 1)], ids=str)
orders = pytest.mark.parametrize("order", [0, 1, 2])


def objective_of(kind):
    return Objective(Cosine(), Uniform(0.05, 0.95), EDMWeighting(0.5), kind, SIGMA_DATA)


class Small(nn.Module):
    """A smooth network of sample and time with parameters in two layers."""

    def __init__(self, shape, hidden=4):
        super().__init__()
        size, source = math.prod(shape), generator("small network")
        self.inward = nn.Parameter(torch.randn(hidden, size, generator=source, dtype=WIDE))
        self.of_time = nn.Parameter(torch.randn(hidden, generator=source, dtype=WIDE))
        self.outward = nn.Parameter(torch.randn(size, hidden, generator=source, dtype=WIDE))

    def forward(self, x, noised):
        time = (1 + noised.t)[:, None] * self.of_time
        hidden = torch.tanh(x.flatten(1) @ self.inward.T + time)
        return (hidden @ self.outward.T).reshape(x.shape)


def draws_of(shape, t, noise=None, key=0):
    """One draw at each time, each of its own sample, with importance weights."""
    source = generator("draws", key)
    t = torch.as_tensor(t, dtype=WIDE)
    x0 = torch.randn(len(t), *shape, generator=source, dtype=WIDE)
    if noise is None:
        noise = torch.randn(len(t), *shape, generator=source, dtype=WIDE)
    weight = 0.5 + torch.rand(len(t), generator=source, dtype=WIDE)
    alpha, sigma = (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()
    return with_noise(Noised(noise, x0, noise, t, alpha, sigma, weight), noise)


def with_noise(noised, noise):
    scale = (-1,) + (1,) * (noise.ndim - 1)
    xt = noised.alpha.reshape(scale) * noised.x0 + noised.sigma.reshape(scale) * noise
    return replace(noised, xt=xt, noise=noise)


def repeated(noised, count):
    """Copies of one draw."""
    values = {field.name: getattr(noised, field.name) for field in fields(noised)}
    return Noised(
        **{
            name: x.expand(count, *x.shape[1:]) if isinstance(x, Tensor) else x
            for name, x in values.items()
        }
    )


class Polynomial(NamedTuple):
    """What autograd finds of the network around one sample without noise."""

    weight: Tensor
    target: Tensor
    q: Tensor
    delta: Tensor
    value: Tensor
    jacobian: Tensor
    hessian: Tensor

    def loss(self, z, order):
        """``w / d ‖T_k F(z) - p x0 - q z‖²`` for ``z (n, d)``."""
        output = self.value.expand_as(z)
        if order > 0:
            output = output + self.delta * z @ self.jacobian.T
        if order > 1:
            output = output + self.delta**2 / 2 * torch.einsum("oij,ni,nj->no", self.hessian, z, z)
        error = output - self.target - self.q * z
        return self.weight * error.square().mean(dim=1)

    def mean(self, order):
        """Its mean over z, by traces and norms."""
        d, delta = len(self.value), self.delta
        e = self.value - self.target
        found = e @ e + self.q**2 * d
        if order > 0:
            a = delta * self.jacobian - self.q * torch.eye(d, dtype=WIDE)
            found = e @ e + a.square().sum()
        if order > 1:
            trace = self.hessian.diagonal(dim1=1, dim2=2).sum(1)
            of_squares = trace.square() + 2 * self.hessian.square().sum(dim=(1, 2))
            found = found + delta**2 * e @ trace + delta**4 / 4 * of_squares.sum()
        return self.weight * found / d


def polynomial(network, noised, kind):
    """The polynomial at the single draw in ``noised``, with coefficients written by hand."""
    t, alpha, sigma = noised.t[0], noised.alpha[0], noised.sigma[0]
    norm = (sigma**2 + (alpha * SIGMA_DATA) ** 2).sqrt()
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    p, q, scale = {
        "x0": (one, zero, one),
        "epsilon": (zero, one, one),
        "v": (-sigma, alpha, one),
        "score": (zero, -1 / sigma, one),
        "velocity": (-math.pi / 2 * sigma, math.pi / 2 * alpha, one),
        "edm": (sigma / (SIGMA_DATA * norm), -alpha * SIGMA_DATA / norm, 1 / norm),
    }[kind]
    b = sigma / (sigma * p - alpha * q)
    weight = noised.weight[0] * ((alpha / sigma) ** 2 + 4) * b**2

    def function(u):
        return network(u.reshape(noised.x0.shape), noised).flatten()

    x0 = noised.x0.flatten()
    u0 = scale * alpha * x0
    hessians = [hessian(lambda u, i=i: function(u)[i], u0) for i in range(len(x0))]
    with torch.no_grad():
        value = function(u0)
    return Polynomial(
        weight, p * x0, q, scale * sigma, value, jacobian(function, u0), torch.stack(hessians)
    )


def nodes_and_weights(dimension, count=5):
    """Gauss-Hermite quadrature, exact for polynomials of a degree below 10."""
    nodes, weights = (torch.from_numpy(x) for x in numpy.polynomial.hermite_e.hermegauss(count))
    weights = weights / weights.sum()
    grid = torch.tensor(list(itertools.product(nodes.tolist(), repeat=dimension)), dtype=WIDE)
    mass = torch.tensor(list(itertools.product(weights.tolist(), repeat=dimension)), dtype=WIDE)
    return grid, mass.prod(dim=1)


@shapes
@orders
def test_the_terms_are_the_loss_of_the_polynomial_minus_its_mean(kind, order, shape):
    network, objective = Small(shape), objective_of(kind)
    noised = draws_of(shape, [0.1, 0.4, 0.8])
    with torch.no_grad():
        terms = taylor_terms(network, noised, objective, order)
        constant = constant_term(noised, objective)
    assert terms.shape == (3, 1 if order == 0 else 2)
    for row in range(3):
        one = Noised(*(getattr(noised, f.name)[row : row + 1] for f in fields(noised)[:7]))
        expected, z = polynomial(network, one, kind), one.noise.flatten(1)
        there, back = expected.loss(z, order), expected.loss(-z, order)
        close = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(terms[row, :1], (there - back) / 2, **close)
        even = terms[row, 1:].sum() + constant[row]
        torch.testing.assert_close(even, ((there + back) / 2)[0] - expected.mean(order), **close)


@shapes
@orders
def test_the_mean_of_the_polynomials_loss_is_what_the_traces_say(kind, order, shape):
    """By quadrature over the noise, which is exact: the loss is of degree at most 4."""
    one = draws_of(shape, [0.3])
    expected = polynomial(Small(shape), one, kind)
    z, mass = nodes_and_weights(math.prod(shape))
    torch.testing.assert_close(mass @ expected.loss(z, order), expected.mean(order))


@pytest.mark.parametrize("order", [1, 2])
def test_the_mean_over_drawn_noise_is_what_the_traces_say(order, z_score):
    for shape in ((2,), (3,)):
        expected = polynomial(Small(shape), draws_of(shape, [0.3]), "v")
        z = torch.randn(100_000, *shape, generator=generator("noise"), dtype=WIDE)
        assert abs(z_score(expected.loss(z, order), float(expected.mean(order)))) < 4


def gradients(network, values):
    """The gradient of each number by the parameters, ``(n, P)``."""
    rows = []
    for value in values:
        parts = torch.autograd.grad(value, list(network.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in parts]))
    return torch.stack(rows)


def means_of_gradients(network, noised, objective, order, mass):
    """The gradient of each part's mean over nodes, and the size of a single one ``(parts,)``."""
    terms = taylor_terms(network, noised, objective, order)
    means = gradients(network, mass @ terms)
    return means, gradients(network, terms[0]).norm(dim=1)


@shapes
@orders
def test_the_gradient_of_each_term_has_mean_zero(kind, order, shape):
    network = Small(shape)
    z, mass = nodes_and_weights(math.prod(shape))
    one = repeated(draws_of(shape, [0.3]), len(z))
    noised = with_noise(one, z.reshape(-1, *shape))
    means, _ = means_of_gradients(network, noised, objective_of(kind), order, mass)
    assert float(means.abs().max()) < 1e-10


def test_with_random_directions_too_the_gradient_of_each_term_has_mean_zero(kind):
    """Over all noise and all directions, by quadrature; with one direction the mean is not zero."""
    network, objective = Small((2,)), objective_of(kind)
    z, mass = nodes_and_weights(2)
    v = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=WIDE)
    mass_of_v = torch.full((4,), 0.25, dtype=WIDE)
    i, j = torch.cartesian_prod(torch.arange(len(z)), torch.arange(len(v))).T
    noised = with_noise(repeated(draws_of((2,), [0.3]), len(i)), z[i])
    noised = replace(noised, probes=v[j, None])
    means, size = means_of_gradients(network, noised, objective, 1, mass[i] * mass_of_v[j])
    assert float(means.abs().max()) < 1e-10

    fixed = replace(noised, probes=v[:1, None].expand(len(i), -1, -1))
    means, size = means_of_gradients(network, fixed, objective, 1, mass[i] * mass_of_v[j])
    assert float(means[0].abs().max()) < 1e-10
    assert float(means[1].norm()) > 1e-3 * float(size[1])


def test_several_directions_are_averaged_over():
    network, objective = Small((3,)), objective_of("epsilon")
    noised = draws_of((3,), [0.2, 0.6])
    probes = torch.randn(2, 4, 3, generator=generator("directions"), dtype=WIDE)
    with torch.no_grad():
        found = taylor_terms(network, replace(noised, probes=probes), objective, 1)
        single = [
            taylor_terms(network, replace(noised, probes=probes[:, i : i + 1]), objective, 1)
            for i in range(4)
        ]
    torch.testing.assert_close(found, torch.stack(single).mean(dim=0))


def test_directions_along_the_axes_give_the_exact_trace():
    """``sqrt(d)`` times the axes: the mean of ``v vᵀ`` over them is the identity."""
    network, objective = Small((3,)), objective_of("edm")
    noised = draws_of((3,), [0.2, 0.6])
    probes = math.sqrt(3) * torch.eye(3, dtype=WIDE).expand(2, 3, 3)
    with torch.no_grad():
        found = taylor_terms(network, replace(noised, probes=probes), objective, 1)
        exact = taylor_terms(network, noised, objective, 1)
    torch.testing.assert_close(found, exact)


@orders
def test_opposite_noise_cancels_the_odd_term_and_keeps_the_even_one(kind, order):
    network, objective = Small((3,)), objective_of(kind)
    noised = draws_of((3,), [0.1, 0.4, 0.8])
    with torch.no_grad():
        there = taylor_terms(network, noised, objective, order)
        back = taylor_terms(network, with_noise(noised, -noised.noise), objective, order)
    torch.testing.assert_close(there[:, 0], -back[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(there[:, 1:], back[:, 1:], rtol=1e-12, atol=1e-12)


def test_for_x0_prediction_the_order_0_term_is_zero():
    network, objective = Small((2,)), objective_of("x0")
    noised = draws_of((2,), [0.1, 0.4, 0.8])
    term = taylor_terms(network, noised, objective, 0)
    assert not gradients(network, term[:, 0]).any()
    assert not term.any()
    assert not constant_term(noised, objective).any()


def test_the_term_of_order_0_is_that_of_the_output_at_the_clean_points(kind):
    network, objective = Small((2,)), objective_of(kind)
    noised = draws_of((2,), [0.1, 0.4, 0.8])
    clean = clean_points(replace(noised, probes=noised.noise[:, None]))
    assert clean.probes is None
    assert not clean.noise.any()
    torch.testing.assert_close(clean.xt, noised.alpha[:, None] * noised.x0)
    scale = prediction(kind, Cosine(), noised.t, SIGMA_DATA).input_scale
    output = network(scale[:, None] * clean.xt, clean)
    torch.testing.assert_close(
        first_term(output, noised, objective), taylor_terms(network, noised, objective, 0)
    )


@pytest.mark.parametrize(("order", "least"), [(0, 20), (1, 1e3), (2, 1e5)])
@pytest.mark.parametrize("kind", ["epsilon", "edm", "v"])
def test_at_low_noise_little_variance_of_the_gradient_is_left(kind, order, least):
    network, objective = Small((2,)), objective_of(kind)
    noise = torch.randn(100, 2, generator=generator("noise"), dtype=WIDE)
    noised = with_noise(repeated(draws_of((2,), [0.005]), 100), noise)
    target = TargetEstimate(noised.x0, noised.t, noised.t)
    losses = diffusion_loss(network, noised, target, objective).per_draw
    terms = taylor_terms(network, noised, objective, order).sum(dim=1)
    before = gradients(network, losses).var(dim=0).sum()
    after = gradients(network, losses - terms).var(dim=0).sum()
    assert float(before / after) > least


@orders
def test_importance_weights_and_known_products_multiply_the_terms(order):
    network, objective = Small((2,)), objective_of("edm")
    noised = draws_of((2,), [0.1, 0.4, 0.8])
    factor = torch.tensor([0.5, 2.0, 3.0], dtype=WIDE)
    with torch.no_grad():
        one, weighted = (replace(noised, weight=x) for x in (torch.ones_like(factor), factor))
        plain = taylor_terms(network, one, objective, order)
        found = taylor_terms(network, weighted, objective, order)
        product = factor * objective.weight(noised.t)
        known = replace(noised, loss_weight=product)
        torch.testing.assert_close(found, factor[:, None] * plain)
        torch.testing.assert_close(taylor_terms(network, known, objective, order), found)
        constant = constant_term(known, objective)
        torch.testing.assert_close(constant, constant_term(weighted, objective))


@orders
def test_float32_is_close_to_float64(kind, order):
    network, objective = Small((3,)), objective_of(kind)
    noised = draws_of((3,), [0.1, 0.4, 0.8])
    narrow = Noised(*(getattr(noised, f.name).float() for f in fields(noised)[:7]))
    with torch.no_grad():
        wide = taylor_terms(network, noised, objective, order)
        found = taylor_terms(network.float(), narrow, objective, order)
    assert found.dtype == torch.float32
    scale = float(loss_weight(noised, objective).max())
    torch.testing.assert_close(found.double(), wide, rtol=1e-4, atol=1e-5 * scale)


class Attention(nn.Module):
    """Self-attention over the coordinates of a point, by torch's own function or written out."""

    def __init__(self, fused):
        super().__init__()
        source = generator("attention")
        self.fused = fused
        self.embed = nn.Parameter(torch.randn(3, 3, 8, generator=source))
        self.read = nn.Parameter(torch.randn(8, generator=source))

    def forward(self, x, noised):
        tokens = torch.stack([torch.ones_like(x), x, noised.t[:, None] * x], dim=2)
        q, k, v = (torch.tanh(tokens @ embed)[:, None] for embed in self.embed)
        if self.fused:
            mixed = scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.mT / math.sqrt(8)).softmax(dim=-1) @ v
        return mixed[:, 0] @ self.read


@pytest.mark.parametrize("order", [1, 2])
def test_fused_attention_has_the_terms_of_attention_that_is_written_out(order):
    objective = objective_of("epsilon")
    noised = draws_of((4,), [0.1, 0.4, 0.8])
    noised = Noised(*(getattr(noised, f.name).float() for f in fields(noised)[:7]))
    found = {}
    for fused in (True, False):
        network = Attention(fused)
        terms = taylor_terms(network, noised, objective, order)
        found[fused] = terms, gradients(network, terms.sum(dim=0))
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
