"""One estimate for all that frozen teachers distil: the upstream's gradient from K draws.

An upstream (a renderer, a generator, an encoder) makes x; a teacher says for noised copies of it in
which direction x should go. With R outputs x_r and K draws of each,

    g_r = 1/K Σ_k w(t_rk) p/q(t_rk) f(x_r, t_rk, noise_rk),
    ĝ = 1/R Σ_r J_rᵀ g_r,                      J = dx/dθ,

so that the upstream runs, and is differentiated, once for each x_r on the averaged cotangent
(Bettencourt, Wu, Atzmon, Lucas and Lorraine 2026, arXiv 2605.21489, equations 5 and 13). Its mean
does not depend on K, strata, proposal or pairs, as all draws count alike and f is not changed by
how likely a draw was: what is to be clipped or normalised belongs into f, before the weight p/q.
The teacher runs without gradient and in chunks: its memory does not depend on K.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vr.core.rows import in_chunks, tensors
from lightning_vr.core.types import WHOLE_STEP, Clean, Noised, StepPart
from lightning_vr.core.validation import check_samples
from lightning_vr.estimators.draws import Draws
from lightning_vr.estimators.loss import loss_weight
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import expand

Residual = Callable[[Noised], Tensor]
"""From draws to the direction of each ``(n, *)``, in the unit of the objective's prediction."""


@dataclass(frozen=True)
class DistillationEstimate:
    """An unbiased estimate of the gradient that a teacher gives the outputs of an upstream.

    Attributes:
        loss: Scalar to differentiate. Its gradient is ĝ; its value is half of the mean over the
            outputs of ``‖g_r‖²``, which tells of the size of the gradient and has no minimum.
        noised: The draws.
        gradient: g_r, the gradient by each output ``(R, *)``.
        residual: Direction f of each draw, without weight ``(K·R, *)``.
        weight: Product of importance weight and w of each draw ``(K·R,)``.
        x0_scale: What turns a residual into one of x0 ``(K·R,)``; None for residuals of noise.
    """

    loss: Tensor
    noised: Noised
    gradient: Tensor
    residual: Tensor
    weight: Tensor
    x0_scale: Tensor | None = None

    # what each step would pay for and few ask for is computed when it is asked for

    @property
    def per_draw(self) -> Tensor:
        """Weighted squared residual of each draw per dimension ``(K·R,)``."""
        return self.weight * self.residual.flatten(1).square().mean(dim=1)

    @property
    def x0_hat(self) -> Tensor:
        """The clean sample that each residual stands for ``(K·R, *)``."""
        scale = -self.noised.noise_level if self.x0_scale is None else self.x0_scale
        return self.noised.x0 + expand(scale, self.residual) * self.residual

    @property
    def control(self) -> None:
        """There is no control variate."""

    @property
    def bound(self) -> None:
        """There is no learned variance."""

    def numbers(self) -> dict[str, float | Tensor]:
        """Return what loggers show, without waiting for the device.

        ``gradient_norm`` and ``residual_norm`` are means of norms over outputs and over draws,
        ``largest_weight`` is that of a draw over their mean.
        """
        norms = (x.detach().flatten(1).norm(dim=1).mean() for x in (self.gradient, self.residual))
        weight = self.noised.weight if self.noised.loss_weight is None else self.noised.loss_weight
        names = ("gradient_norm", "residual_norm", "largest_weight")
        found = dict(zip(names, (*norms, weight.max() / weight.mean()), strict=True))
        return {"loss": self.loss.detach(), **found}


def distill(
    clean: Clean,
    residual: Residual,
    draws: Draws,
    objective: Objective,
    source: torch.Generator,
    part: StepPart = WHOLE_STEP,
) -> DistillationEstimate:
    """Return an unbiased estimate of the gradient that residuals give the upstream.

    Args:
        clean: R outputs of the upstream, with its graph; a condition of one row is for all.
        residual: The teacher's direction; called without gradient, on chunks of draws.
        draws: K draws of each output.
        objective: Schedule, density of t, and the weight w(t) as ``objective.weight``.
        source: Generator of all randomness, on the device of ``clean``.
        part: The part of an optimizer step that the outputs are.

    Raises:
        ValueError: If an output has no graph where gradients are enabled, or if residuals have
            another shape than draws.
    """
    x0 = clean.x0
    check_samples("x0", x0)
    if torch.is_grad_enabled() and not x0.requires_grad:
        raise ValueError(
            f"`x0` must have the graph of what made it, got a tensor {tuple(x0.shape)} without "
            f"one: render with gradients enabled and without `detach`."
        )
    clean = clean.detached()
    with torch.no_grad():
        noised = draws(clean, objective, source, part)
        direction = _residuals(residual, noised, draws.chunk(len(noised.t), noised.t.device))
        weight = loss_weight(noised, objective)
        gradient = expand(weight, direction) * direction
        if len(gradient) > len(x0):
            gradient = gradient.reshape(len(x0), -1, *x0.shape[1:]).mean(dim=1)
        is_noise = objective.prediction == "epsilon"
        x0_scale = None if is_noise else objective.coefficients(noised.t).b
    # x0 less itself is zero, and has the gradient of x0
    loss = ((0.5 * gradient + (x0 - clean.x0)) * gradient).sum() / len(x0)
    return DistillationEstimate(loss, noised, gradient, direction, weight, x0_scale)


def check_distillation(
    draws: Draws, objective: Objective, without_pilots: str | None = None
) -> None:
    """Raise if draws would not estimate a distillation's gradient.

    Args:
        draws: The draws.
        objective: What they are to estimate.
        without_pilots: The class that uses them, if it runs no pilots.

    Raises:
        ValueError: If a proposal is zero where the weight is not, or learns from what is not there,
            or if nobody would choose the number of draws.
    """
    if without_pilots is not None and getattr(draws, "resamples", None) == "auto":
        raise ValueError(
            f"`resamples` must be a number in a {without_pilots}, which runs no pilots, got "
            f"'auto': use CARV(8) or another number; a ScoreDistillation runs pilots."
        )
    draws.check(objective)
    if getattr(getattr(draws, "proposal", None), "moment", None) == "bound":
        raise ValueError(
            "`moment` must be 'gradient' or 'loss' for draws of a teacher, got 'bound', which is "
            "of a learned variance: use LearnedProposal()."
        )


def _residuals(residual: Residual, noised: Noised, chunk: int) -> Tensor:
    if chunk < len(noised.t):
        parts = (Noised(**rows) for rows in in_chunks(tensors(noised), chunk))
        return torch.cat([_residuals(residual, part, chunk) for part in parts])
    found = residual(noised)
    if found.shape != noised.x0.shape:
        raise ValueError(
            f"`residual` must return the shape of the draws, {tuple(noised.x0.shape)}, got "
            f"{tuple(found.shape)}: return one direction for each draw."
        )
    return found.to(noised.x0.dtype)
