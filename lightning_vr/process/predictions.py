"""Prediction types: what the network outputs, as an affine map to x0.

Every prediction type is a linear function of (x0, noise), ``p x0 + q noise``, with coefficients
that depend on t alone. With ``x_t = alpha x0 + sigma noise`` that gives the map
``x0_hat = a x_t + b output`` with ``b = sigma / (sigma p - alpha q)`` and
``a = -q / (sigma p - alpha q)``, so that targets, weights and estimators live in x0 space and are
written once. A target estimate D in place of x0 becomes ``p x0 + q noise + (D - x0) / b``: nothing
cancels at low noise, where ``(x_t - alpha x0) / sigma`` would.

==========  ===========================================  =============================
prediction  p x0 + q noise                               source
==========  ===========================================  =============================
x0          x0
epsilon     noise                                        Ho et al. 2020, 2006.11239
v           alpha noise - sigma x0                       Salimans, Ho 2022, 2202.00512
score       -noise / sigma                               Song et al. 2021, 2011.13456
velocity    alpha' x0 + sigma' noise                     Liu et al. 2022, 2209.03003
edm         (sigma/sigma_d x0 - alpha sigma_d noise)/n   Karras et al. 2022, 2206.00364
==========  ===========================================  =============================

with ``n = sqrt(sigma² + alpha² sigma_d²)``, the standard deviation of x_t for data of standard
deviation sigma_d. It is the raw network F of EDM's preconditioning, written for every alpha; with
it the network's input is scaled by ``1 / n``.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_vr.core.validation import check_choice
from lightning_vr.process.schedules import Schedule, expand

PredictionType = Literal["x0", "epsilon", "v", "score", "velocity", "edm"]


@dataclass(frozen=True)
class Prediction:
    """Coefficients of one prediction type at the times of a batch, each ``(B,)``.

    Attributes:
        p: Coefficient of x0 in what the network predicts.
        q: Coefficient of the noise in what the network predicts.
        a: Coefficient of x_t in x0_hat.
        b: Coefficient of the network's output in x0_hat.
        input_scale: Factor on x_t before it enters the network.
    """

    p: Tensor
    q: Tensor
    a: Tensor
    b: Tensor
    input_scale: Tensor

    def x0_hat(self, xt: Tensor, output: Tensor) -> Tensor:
        """Return the denoised sample from the network's output, both ``(B, *)``."""
        return expand(self.a, xt) * xt + expand(self.b, xt) * output

    def output(self, x0: Tensor, noise: Tensor, target: Tensor) -> Tensor:
        """Return the output whose x0_hat is ``target``, given the draw that made x_t.

        Args:
            x0: The clean sample ``(B, *)``.
            noise: The noise ``(B, *)``.
            target: An estimate of E[x0 | x_t] ``(B, *)``; x0 itself for plain score matching.
        """
        shift = (target - x0) / expand(self.b, x0)
        return expand(self.p, x0) * x0 + expand(self.q, x0) * noise + shift


def squared_jacobian(
    kind: PredictionType,
    schedule: Schedule,
    t: Tensor,
    sigma_data: float = 0.5,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return b² alone ``(B,)``, of which loss weights are made; arguments as for ``prediction``."""
    if kind == "epsilon":
        alpha, sigma = scales or schedule.scales(t)
        b = sigma / alpha
    else:
        b = prediction(kind, schedule, t, sigma_data, scales).b
    return b * b


def prediction(
    kind: PredictionType,
    schedule: Schedule,
    t: Tensor,
    sigma_data: float = 0.5,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Prediction:
    """Return the coefficients of prediction type ``kind`` at times ``t (B,)``.

    Args:
        kind: The prediction type.
        schedule: The schedule.
        t: Times ``(B,)``.
        sigma_data: Standard deviation of the data, for ``"edm"``.
        scales: The schedule's ``alpha`` and ``sigma`` at ``t``, if they are known.

    Raises:
        ValueError: If ``kind`` is no prediction type.
    """
    check_choice("prediction", kind, get_args(PredictionType))
    alpha, sigma = scales or schedule.scales(t)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    input_scale = one
    if kind == "x0":
        p, q = one, zero
    elif kind == "epsilon":
        return Prediction(zero, one, 1 / alpha, -sigma / alpha, one)
    elif kind == "v":
        p, q = -sigma, alpha
    elif kind == "score":
        p, q = zero, -1 / sigma
    elif kind == "velocity":
        p, q = schedule.alpha_derivative(t), schedule.sigma_derivative(t)
    else:
        norm = torch.sqrt(sigma**2 + (alpha * sigma_data) ** 2)
        p, q = sigma / (sigma_data * norm), -alpha * sigma_data / norm
        input_scale = 1 / norm
    determinant = sigma * p - alpha * q
    return Prediction(p, q, -q / determinant, sigma / determinant, input_scale)
