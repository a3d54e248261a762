r"""Densities of the noise level given by a table, whatever the schedule's time is.

``EntropyRate`` draws noise levels where the noised sample tells most about the clean one. With the
least squared error ``mmse(s) = E ‖x0 - E[x0 | x_s]‖²``, the I-MMSE identity (Guo, Shamai and Verdú
2005, equation 1) with SNR = 1 / s² gives the rate of the conditional entropy

    d H(x0 | x_s) / d log s = mmse(s) / s²,

so that the density of log s is proportional to the squared error of epsilon. It is the density of
InfoNoise (Raya et al. 2026, arXiv 2602.18647), which estimates it while training from the losses;
here it is fixed, from losses that were measured before. How InfoNoise smooths and truncates its
estimate is not reproduced.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_vr.process.noise_level_table import NoiseLevelTable
from lightning_vr.process.quantile_density import QuantileDensity
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.timesteps import Density


class NoiseLevelDensity(Density):
    """A density of log s, linear between noise levels and 0 outside. It changes the objective.

    Args:
        schedule: The schedule, which says at what time the noise level is s.
        noise_levels: Increasing noise levels ``(L,)``, within those of the schedule.
        values: The density of log s at each, of any scale.
    """

    changes_objective = True

    def __init__(
        self, schedule: Schedule, noise_levels: Sequence[float], values: Sequence[float]
    ) -> None:
        super().__init__()
        self.schedule, self.noise_levels, self.values = schedule, [*noise_levels], [*values]
        self.table = NoiseLevelTable(noise_levels, values)
        self._densities: dict[torch.device, tuple[QuantileDensity, Tensor]] = {}

    def icdf(self, u: Tensor) -> Tensor:
        density, logs = self._on(u.device)
        v = density.icdf(u.to(logs))
        level = torch.lerp(logs[0], logs[-1], v).exp()
        return self.schedule.time(level).to(u.dtype)

    def cdf(self, t: Tensor) -> Tensor:
        density, logs = self._on(t.device)
        return density.cdf(self._quantile(t, logs).clamp(0, 1)).to(t.dtype)

    def log_prob(self, t: Tensor) -> Tensor:
        density, logs = self._on(t.device)
        v = self._quantile(t, logs)
        height = density(v.clamp(0, 1)) / (logs[-1] - logs[0])
        wide = t.to(logs)
        slope = log_level_slope(self.schedule, wide)
        inside = (v >= 0) & (v <= 1)
        return torch.where(inside, torch.log(height * slope), -torch.inf).to(t.dtype)

    def _quantile(self, t: Tensor, logs: Tensor) -> Tensor:
        level = self.schedule.noise_level(t.to(logs)).clamp(min=torch.finfo(logs.dtype).tiny)
        return (level.log() - logs[0]) / (logs[-1] - logs[0])

    def _on(self, device: torch.device) -> tuple[QuantileDensity, Tensor]:
        if device not in self._densities:
            logs, values = self.table.columns(device)
            edges = (logs - logs[0]) / (logs[-1] - logs[0])
            edges[-1] = 1
            self._densities[device] = QuantileDensity(edges, values[:-1], values[1:]), logs
        return self._densities[device]


class EntropyRate(NoiseLevelDensity):
    """A density of log s proportional to the rate of the conditional entropy.

    It changes the objective.

    Args:
        schedule: The schedule, which says at what time the noise level is s.
        noise_levels: Increasing noise levels ``(L,)``, within those of the schedule.
        errors: Mean squared error of x0_hat at each ``(L,)``, such as a held-out loss with weight 1
            in x0 space; any scale.
    """

    def __init__(
        self, schedule: Schedule, noise_levels: Sequence[float], errors: Sequence[float]
    ) -> None:
        NoiseLevelTable(noise_levels, errors)  # raises before anything is divided
        rates = [x / level**2 for x, level in zip(errors, noise_levels, strict=True)]
        super().__init__(schedule, noise_levels, rates)
        self.errors = [*errors]


def log_level_slope(schedule: Schedule, t: Tensor) -> Tensor:
    """Return ``d log s / dt`` at times, element by element."""
    slope: Tensor = schedule.sigma_derivative(t) / schedule.sigma(t)
    return slope - schedule.alpha_derivative(t) / schedule.alpha(t)
