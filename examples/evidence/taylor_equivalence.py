"""Control of the objective and control of its gradient are the same, if the coefficient is.

The gradient of the polynomial's loss, by autograd, is compared with the control variate on the
gradient that is made by hand: the polynomial of the network times the polynomial of its derivative
by each parameter, in float64, on an MLP in the plane. No step of the two has a common code.
Source: Jeha et al. 2024, arXiv 2408.12270: "we prove an equivalence between the two".
"""

from collections.abc import Callable

import torch
from study import Study
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp

DELTA = 0.3


def run(study: Study) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2)).double()
    x0, noise = torch.randn(2, 5, 2, dtype=torch.float64)
    for order in (0, 1, 2):
        by_objective = gradient_of_polynomial(network, x0, noise, order)
        by_hand = polynomial_of_gradient(network, x0, noise, order)
        error = (by_objective - by_hand).abs().max() / by_objective.abs().max()
        print(f"order {order}: largest difference {float(error):.1e} of the largest entry")


def polynomial(
    function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor, order: int
) -> Tensor:
    """Return the Taylor polynomial of a function of one point at ``at + along``."""
    if order == 0:
        return function(at)
    value, slope = jvp(function, (at,), (along,))
    if order == 1:
        return value + slope
    bend = jvp(lambda u: jvp(function, (u,), (along,))[1], (at,), (along,))[1]
    return value + slope + 0.5 * bend


def gradient_of_polynomial(network: nn.Module, x0: Tensor, noise: Tensor, order: int) -> Tensor:
    output = polynomial(network, x0, DELTA * noise, order)
    loss = (output + noise).square().sum(dim=1).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def polynomial_of_gradient(network: nn.Module, x0: Tensor, noise: Tensor, order: int) -> Tensor:
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def called(weights: dict[str, Tensor], u: Tensor) -> Tensor:
        return functional_call(network, weights, (u,))

    total = 0
    for x, z in zip(x0, noise, strict=True):
        residual = polynomial(lambda u: called(weights, u), x, DELTA * z, order) + z

        def derivatives(u: Tensor) -> Tensor:
            found = jacrev(called)(weights, u)
            return torch.cat([each.flatten(1) for each in found.values()], dim=1)

        total = total + 2 * residual @ polynomial(derivatives, x, DELTA * z, order)
    return total / len(x0)
