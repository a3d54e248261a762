"""Exact trajectories of the probability-flow ODE, where the exact denoiser is known.

In log s the ODE is ``dz / d log s = z - D(z, s)`` (Song et al. 2021, arXiv 2011.13456, equation
13). The classical Runge-Kutta method of fourth order takes steps of at most 0.05 in log s: its
error is then far below that of any sampler. Below the smallest level it goes on to a thousandth of
it, where D itself is the end of the trajectory but for one part in a million of the last stretch.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_vr.process.solvers.solver import Problem

LOG_STEP = 0.05
"""Longest step in log s."""

_LAST_STRETCH = 1e-3
"""Ratio of noise levels between the smallest level asked for and where the path ends."""


def exact_path(
    exact: Problem, start: Tensor, levels: Sequence[float], log_step: float = LOG_STEP
) -> dict[float, Tensor]:
    """Return where trajectories are at each noise level and at 0, by level.

    Args:
        exact: The exact denoiser, in float64; its ``levels`` are not used.
        start: Samples at the largest of the levels, in z ``(n, *)``, float64.
        levels: Noise levels, positive.
        log_step: Longest step in log s.
    """
    ordered = sorted({*levels}, reverse=True)
    z, now = start, ordered[0]
    found = {now: z}
    for level in ordered[1:]:
        z, now = _advance(exact, z, now, level, log_step), level
        found[level] = z
    end = _LAST_STRETCH * now
    # there the path bends little: coarser steps are as exact
    z = _advance(exact, z, now, end, 2 * log_step)
    return found | {0.0: exact.x0_hat(z, end)}


def _advance(exact: Problem, z: Tensor, level: float, next_level: float, log_step: float) -> Tensor:
    def slope(z: Tensor, log_level: float) -> Tensor:
        return z - exact.x0_hat(z, math.exp(log_level))

    start, length = math.log(level), math.log(next_level / level)
    count = max(1, math.ceil(-length / log_step))
    h = length / count
    for i in range(count):
        at = start + i * h
        k1 = slope(z, at)
        k2 = slope(z + h / 2 * k1, at + h / 2)
        k3 = slope(z + h / 2 * k2, at + h / 2)
        k4 = slope(z + h * k3, at + h)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z
