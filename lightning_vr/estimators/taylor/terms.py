"""Loss terms of a Taylor polynomial of the network, minus their exact means.

Given the sample x0 and the time t, the network F sees ``u0 + δ z`` with ``u0 = c_in α x0``,
``δ = c_in σ`` and noise z, and its target for plain score matching is ``p x0 + q z``
(``predictions.py``). With the polynomial of order k around u0 in place of F,

    C_k = w / d ‖T_k F(z) - p x0 - q z‖²,
    A = δ J - q I,      e = F(u0) - p x0,      S = δ²/2 H[z, z],

    E C_0 = w / d (‖e‖² + q² d)
    E C_1 = w / d (‖e‖² + ‖A‖²)
    E C_2 = E C_1 + w / d (δ² e · ΔF + δ⁴/4 Σ_i ( (tr H_i)² + 2 ‖H_i‖² ))

with the Jacobian J and the Hessians H_i of the outputs at u0 and Frobenius norms (the control
variate of Jeha, Grathwohl, Andersen, Ek and Frellsen 2024, arXiv 2408.12270, for every schedule and
prediction). As derivatives by the parameters and by the input commute, the gradient of C_k is the
polynomial's gradient, and ``C_k - E C_k`` is a loss term whose gradient has mean zero.

It has an odd part in z, an even part, and one that does not depend on the parameters:

    odd        2 e · A z                  and from order 2 on   2 S · A z
    even       ‖A z‖² - q² ‖z‖² - (‖A‖² - q² d)   and   2 e · S + ‖S‖² minus their means
    constant   q² (‖z‖² - d)

The odd part has mean zero by symmetry, without any trace, and is not correlated with the even one.
Traces are computed exactly from the derivatives along all d axes, for samples of few dimensions, or
estimated along random directions v with ``E v vᵀ = I`` that are independent of z, which keeps the
mean of the gradient at zero. Nothing here depends on the target: with another target than x0 itself
the terms keep their zero mean and explain less.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_vr.core.rows import concatenated, tensors
from lightning_vr.core.types import Noised
from lightning_vr.estimators.loss import Network, loss_weight, network_output
from lightning_vr.estimators.taylor.forward_mode import forward_mode
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import expand


def clean_points(noised: Noised) -> Noised:
    """Return the points around which the network is expanded: the draws without noise."""
    xt = expand(noised.alpha, noised.x0) * noised.x0
    return replace(noised, xt=xt, noise=torch.zeros_like(noised.noise), probes=None)


def first_term(output: Tensor, noised: Noised, objective: Objective) -> Tensor:
    """Return the term of order 0 ``(B, 1)``, odd in the noise.

    Args:
        output: The network's output at ``clean_points(noised)``, ``(B, *)``.
        noised: The draws ``(B, *)``.
        objective: The loss.
    """
    coefficients = objective.coefficients(noised.t)
    e = output - expand(coefficients.p, output) * noised.x0
    product = (e * noised.noise).flatten(1).mean(dim=1)
    return (-2 * coefficients.q * loss_weight(noised, objective) * product)[:, None]


def taylor_terms(network: Network, noised: Noised, objective: Objective, order: int) -> Tensor:
    """Return the odd and the even term of each draw ``(B, 2)``; of order 0 the odd one ``(B, 1)``.

    The even term of order 1 estimates its traces along ``noised.probes``, or takes exact ones if
    these are None.

    Args:
        network: The raw network, which orders 1 and 2 differentiate in forward mode.
        noised: The draws ``(B, *)``.
        objective: The loss.
        order: Order of the polynomial: 0, 1 or 2.
    """
    if order == 0:
        output = network_output(network, clean_points(noised), objective)
        return first_term(output, noised, objective)
    # autocast would multiply the derivatives, which are float32, in 16 bits
    with torch.autocast(noised.t.device.type, enabled=False):
        return _both_terms(network, noised, objective, order)


def _both_terms(network: Network, noised: Noised, objective: Objective, order: int) -> Tensor:
    coefficients = objective.coefficients(noised.t)
    q, z = coefficients.q[:, None], noised.noise.flatten(1)
    if order == 2:
        found = _second_order(network, noised, objective)
    elif noised.probes is None:
        found = _first_order(network, noised, objective)
    else:
        found = _along_probes(network, noised, objective)
    e = found.value - coefficients.p[:, None] * noised.x0.flatten(1)

    odd = 2 * ((e + found.bend) * (found.slope - q * z)).sum(dim=1)
    of_slope = (found.slope * (found.slope - 2 * q * z)).sum(dim=1) - found.slope_mean
    of_bend = ((found.bend + 2 * e) * found.bend).sum(dim=1)
    of_bend = of_bend - 2 * (e * found.bend_mean).sum(dim=1) - found.bend_square
    scale = loss_weight(noised, objective) / z.shape[1]
    return torch.stack([odd, of_slope + of_bend], dim=1) * scale[:, None]


def constant_term(noised: Noised, objective: Objective) -> Tensor:
    """Return the part of ``C_k - E C_k`` that does not depend on the parameters, ``(B,)``."""
    q = objective.coefficients(noised.t).q
    square = noised.noise.flatten(1).square().mean(dim=1) - 1
    return loss_weight(noised, objective) * q**2 * square


def _jvp(function: Callable[[Tensor], Any], at: Tensor, along: Tensor) -> tuple[Any, Any]:
    """Return a function of one tensor, and its derivative along a direction."""
    value, derivative = torch.func.jvp(function, (at,), (along,))[:2]
    return value, derivative


class _Expansion(NamedTuple):
    """The polynomial's parts at the noise of each draw, and their means over the noise.

    Attributes:
        value: F(u0) ``(B, d)``.
        slope: δ J z ``(B, d)``.
        slope_mean: ``‖A‖² - q² d``, or an unbiased estimate ``(B,)``.
        bend: S ``(B, d)``.
        bend_mean: Mean of S ``(B, d)``.
        bend_square: Mean of ``‖S‖²`` ``(B,)``.
    """

    value: Tensor
    slope: Tensor
    slope_mean: Tensor
    bend: Tensor
    bend_mean: Tensor
    bend_square: Tensor


def _first_order(network: Network, noised: Noised, objective: Objective) -> _Expansion:
    derivatives = _Derivatives(network, noised, objective, noised.x0[0].numel())
    value, columns = derivatives.first(derivatives.axes)
    return _with_jacobian(value, columns, noised, objective)


def _second_order(network: Network, noised: Noised, objective: Objective) -> _Expansion:
    dimension = noised.x0[0].numel()
    i, j = torch.triu_indices(dimension, dimension, device=noised.t.device)
    derivatives = _Derivatives(network, noised, objective, len(i))
    value, slopes, bends = derivatives.second(derivatives.axes[i], derivatives.axes[j])
    pair = torch.empty(dimension, dimension, dtype=torch.int64, device=i.device)
    pair[i, j] = pair[j, i] = torch.arange(len(i), device=i.device)
    hessian = bends[pair]

    found = _with_jacobian(value, slopes[i == j], noised, objective)
    z = noised.noise.flatten(1)
    trace = torch.einsum("iibo->bo", hessian)
    square = hessian.square().sum(dim=(0, 1, 3))
    return found._replace(
        bend=0.5 * torch.einsum("bi,bj,ijbo->bo", z, z, hessian),
        bend_mean=0.5 * trace,
        bend_square=0.25 * (trace.square().sum(dim=1) + 2 * square),
    )


def _along_probes(network: Network, noised: Noised, objective: Objective) -> _Expansion:
    assert noised.probes is not None
    directions = torch.cat([noised.noise[:, None], noised.probes], dim=1).transpose(0, 1)
    derivatives = _Derivatives(network, noised, objective, len(directions))
    value, slopes = derivatives.first(directions)
    q = objective.coefficients(noised.t).q[:, None]
    along = (slopes[1:] * (slopes[1:] - 2 * q * directions[1:].flatten(2))).sum(dim=2)
    zero = torch.zeros_like(value)
    return _Expansion(value, slopes[0], along.mean(dim=0), zero, zero, zero[:, 0])


def _with_jacobian(
    value: Tensor, columns: Tensor, noised: Noised, objective: Objective
) -> _Expansion:
    """Return the polynomial of order 1, with the columns of δ J ``(d, B, d)``."""
    slope = torch.einsum("bi,ibo->bo", noised.noise.flatten(1), columns)
    trace = torch.einsum("ibi->b", columns)
    q = objective.coefficients(noised.t).q
    mean = columns.square().sum(dim=(0, 2)) - 2 * q * trace
    zero = torch.zeros_like(value)
    return _Expansion(value, slope, mean, zero, zero, zero[:, 0])


class _Derivatives:
    """Derivatives of the network at u0 along directions, times δ for each; all in one batch.

    Args:
        network: The raw network.
        noised: The draws.
        objective: The loss.
        count: Number of directions, or of pairs of these, for each draw.
    """

    def __init__(self, network: Network, noised: Noised, objective: Objective, count: int) -> None:
        points = clean_points(noised)
        coefficients = objective.coefficients(noised.t)
        self.network, self.count = network, count
        self.delta = expand(coefficients.input_scale * noised.sigma, points.xt)
        self.u0 = torch.cat([expand(coefficients.input_scale, points.xt) * points.xt] * count)
        self.rows = Noised(**concatenated([tensors(points)] * count))

    @property
    def axes(self) -> Tensor:
        """All axes, each ``(1, *)``: broadcast to the draws when they are used."""
        shape = self.u0.shape[1:]
        axes = torch.eye(shape.numel(), dtype=self.u0.dtype, device=self.u0.device)
        return axes.reshape(-1, 1, *shape)

    def first(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return F ``(B, d)`` and ``δ J v`` ``(count, B, d)``."""
        with forward_mode(self.u0.device):
            value, slopes = _jvp(self._function, self.u0, self._tangents(directions))
        return self._rows(value)[0], self._rows(slopes)

    def second(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return F, ``δ J v`` and ``δ² H[v, w]``."""

        def slope(u: Tensor) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = _jvp(self._function, u, self._tangents(first))
            return found

        with forward_mode(self.u0.device):
            (value, slopes), (_, bends) = _jvp(slope, self.u0, self._tangents(second))
        return self._rows(value)[0], self._rows(slopes), self._rows(bends)

    def _function(self, u: Tensor) -> Tensor:
        return self.network(u, self.rows).to(self.u0.dtype)

    def _tangents(self, directions: Tensor) -> Tensor:
        return (self.delta * directions).flatten(0, 1)

    def _rows(self, output: Tensor) -> Tensor:
        return output.reshape(self.count, -1, output[0].numel())
