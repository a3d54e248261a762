"""Expectations with a frozen teacher: score distillation, without a DiffusionModule.

An upstream (a renderer, a generator, an encoder) makes x; a frozen diffusion model says for a
noised copy of it in which direction x should go. With R outputs x_r and K draws of each,

    ĝ = 1/R Σ_r J_rᵀ [ 1/K Σ_k w(t_rk) p/q(t_rk) f(x_r, t_rk, noise_rk) ],      J = dx/dθ,

so that the upstream is run, and differentiated, once for each x_r on the averaged cotangent
(Bettencourt, Wu, Atzmon, Lucas and Lorraine 2026, arXiv 2605.21489, equation 13). The teacher runs
without gradient and in chunks: its memory does not depend on K.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_vr.core.rows import in_chunks, tensors
from lightning_vr.core.types import WHOLE_STEP, Clean, Noised, StepPart
from lightning_vr.estimators.draws import Draws
from lightning_vr.estimators.loss import loss_weight
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import expand


def distillation_loss(
    clean: Clean,
    residual: Callable[[Noised], Tensor],
    draws: Draws,
    objective: Objective,
    source: torch.Generator,
    *,
    part: StepPart = WHOLE_STEP,
    clip: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """Return a scalar whose gradient is the unbiased estimate; its value means nothing.

    Example::

        objective = Objective(VP(), Uniform(0.02, 0.98), weighting, prediction="x0")
        render = Clean(renderer(cameras))
        residual = lambda noised: teacher(noised.xt, noised.t, prompt) - noised.noise
        distillation_loss(render, residual, CARV(8, WeightProposal()), objective, source).backward()

    Args:
        clean: R outputs of the upstream, with its graph.
        residual: From draws to the direction of each ``(n, *)``, without any weight: noise
            prediction less noise, or the difference of two scores. It is called without gradient.
        draws: K draws of each output; ``CARV(8)`` with strata is the paper's choice.
        objective: Schedule, density of t and weight w(t), as ``weighting`` with
            ``prediction="x0"``.
        source: Generator of all randomness, on the device of ``clean``.
        part: The part of an optimizer step that the outputs are.
        clip: Largest norm of the direction of one draw, weighted, for K = 1.
        normalize: Whether to give the direction of each draw unit mean magnitude, for K = 1.

    Raises:
        ValueError: If draws are to be clipped or normalised one by one with K > 1.
    """
    for name, value in (("clip", clip), ("normalize", normalize)):
        if value and draws.draws_per_sample > 1:
            raise ValueError(
                f"`{name}` must be off with {draws.draws_per_sample} draws of each sample, got "
                f"{value}: clip or normalise the optimizer's gradient instead, or use one draw. "
                f"With draws that are changed one by one, what is learned would depend on K."
            )
    with torch.no_grad():
        noised = draws(clean, objective, source, part)
        weight = loss_weight(noised, objective)
        chunk = draws.chunk(len(noised.t), noised.t.device)
        parts = [residual(Noised(**part)) for part in in_chunks(tensors(noised), chunk)]
        direction = torch.cat(parts).to(noised.x0.dtype)
        if normalize:
            magnitude = direction.flatten(1).abs().mean(dim=1)
            direction = direction / expand(magnitude, direction)
        cotangent = expand(weight, direction) * direction
        if clip is not None:
            norm = cotangent.flatten(1).norm(dim=1)
            cotangent = cotangent * expand((clip / norm).clamp(max=1), cotangent)
        count = len(clean.x0)
        mean = cotangent.reshape(count, -1, *cotangent.shape[1:]).mean(dim=1)
    return (clean.x0 * mean).sum() / count
