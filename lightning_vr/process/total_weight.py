r"""The total weight W(s) of an objective: density of the noise level times loss weight.

Two objectives with the same W are the same expectation, however W is split into density and weight:

    L = ∫ p(t) λ(t) E ‖x0_hat - x0‖² dt = ∫ W(s) E ‖eps_hat - eps‖² d log s,
    W(s) = p(log s) λ s²,

as ``x0_hat - x0 = -s (eps_hat - eps)``. For EDM W is ``(1 + s² / sigma_data²) N(log s; -1.2,
1.2²)``, a bell. The split decides the variance of the gradient alone: with the second moment
``m(s)`` of the gradient of ``‖eps_hat - eps‖²`` it is least for

    p(log s) ∝ W sqrt(m),      λ s² = W / p

(importance sampling, as in ``estimators.proposals``, which learns that p while training and keeps
the objective's own density as the reference; here both parts are settings).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_vr.process.noise_level_densities import log_level_slope
from lightning_vr.process.noise_level_table import NoiseLevelTable
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.timesteps import Density
from lightning_vr.process.weightings import Weighting


class TotalWeighting(Weighting):
    """The weight that gives the objective the total weight W, whatever the density is.

    ``λ = W(s) / (p(log s) s²)``, with W linear in log s between the given noise levels and 0
    outside. It changes the objective.

    Args:
        noise_levels: Increasing noise levels ``(L,)``.
        total: W at each ``(L,)``.
        timesteps: The density that times are drawn from, the objective's own.
    """

    changes_objective = True

    def __init__(
        self, noise_levels: Sequence[float], total: Sequence[float], timesteps: Density
    ) -> None:
        super().__init__()
        self.table = NoiseLevelTable(noise_levels, total)
        self.noise_levels, self.total, self.timesteps = [*noise_levels], [*total], timesteps

    def forward(self, schedule: Schedule, t: Tensor) -> Tensor:
        level = schedule.noise_level(t)
        total = torch.where(self.table.covers(level), self.table(level), 0)
        density = log_level_density(schedule, self.timesteps, t)
        # where nothing is drawn there is no weight either
        return torch.where(density > 0, total / (density * level**2), 0)


def log_level_density(schedule: Schedule, timesteps: Density, t: Tensor) -> Tensor:
    """Return the density of log s at times ``t``; discrete timesteps count as cells of width 1."""
    slope = log_level_slope(schedule, t).abs()
    if timesteps.steps is not None:
        return 1 / (timesteps.steps * slope)
    return timesteps.log_prob(t).exp() / slope
