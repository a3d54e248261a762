"""Times and noise that are the same in each validation: stratified by noise level, keyed.

The density p(t) is split into L equally likely bins of the noise level. Each sample is noised once
in each bin, with noise of its own, at one of 16 times, which are stratified too. All of it is a
function of the data alone, so that a difference between two steps of a run, or between a run and
one that resumes it, is one of the network.

Draws are numbered ``level · n + sample``. For standard errors the samples are split into 16 blocks,
interleaved over the data set's order: the draws of one sample are in one block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.distributed import all_gather_rows, rank, world_size
from lightning_vr.core.rng import generator
from lightning_vr.core.rows import mapped, tensors
from lightning_vr.core.types import Clean, Noised
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.timesteps import Density

BLOCKS = 16
"""Independent parts of a set's samples, between which standard errors are taken; also the number of
different times in a bin."""


@dataclass(frozen=True)
class LevelTimes:
    """Times in bins of the noise level, in increasing order.

    Attributes:
        times: ``(L, n)``, float32, as networks get them.
        noise_levels: Noise level in the middle of each bin ``(L,)``, float64.
        edges: Noise levels between the bins ``(L - 1,)``, float64.
    """

    times: Tensor
    noise_levels: Tensor
    edges: Tensor

    @classmethod
    def stratified(
        cls, schedule: Schedule, timesteps: Density, levels: int, samples: int
    ) -> "LevelTimes":
        """Return times that are stratified in each of ``levels`` equally likely bins.

        The first 16 of a bin are all that it has; each block of draws has others of them in turn.
        """
        source = generator("fixed draws", "times")
        order = torch.rand(levels, BLOCKS, generator=source, dtype=torch.float64).argsort(dim=1)
        inner = torch.rand(levels, BLOCKS, generator=source, dtype=torch.float64)
        bins = torch.arange(levels, dtype=torch.float64)
        middles, edges = (bins + 0.5) / levels, bins[1:] / levels
        u = (bins[:, None] + (order + inner) / BLOCKS) / levels

        def level(u: Tensor) -> Tensor:
            return schedule.noise_level(timesteps.icdf(u))

        device = next(schedule.buffers(), torch.zeros(0)).device
        u, middles, edges = (x.to(device) for x in (u, middles, edges))
        if float(level(middles[:1])) > float(level(middles[-1:])):
            u, middles, edges = 1 - u, 1 - middles, 1 - edges
        times = timesteps.icdf(u.clamp(2.0**-54, 1 - 2.0**-53))
        times = times.float().cpu()[:, time_numbers(samples)]
        return cls(times, level(middles).double().cpu(), level(edges).double().cpu())


@dataclass(frozen=True)
class FixedDraws:
    """The draws of one data set, of which each rank takes some.

    Attributes:
        name: Key of the noise.
        clean: Samples ``(m, *)`` on the CPU; each is used for ``n / m`` of the draws of a level.
        level_times: Times of n draws at each level.
        schedule: Scales of sample and noise.
    """

    name: str
    clean: Clean
    level_times: LevelTimes
    schedule: Schedule

    @property
    def levels(self) -> int:
        """Number of noise levels."""
        return len(self.level_times.times)

    @property
    def samples(self) -> int:
        """Number of draws at each noise level."""
        return self.level_times.times.shape[1]

    @property
    def local_rows(self) -> Tensor:
        """Numbers of the draws of this rank, in the order of ``batches``."""
        mine = self._local_samples
        return (torch.arange(self.levels)[:, None] * self.samples + mine).flatten()

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Noised]]:
        """Yield this rank's draws, at most ``size`` at a time and of one level, with their numbers.

        Samples are float32, or float64 where the data are.
        """
        x0 = self.clean.x0
        dtype = x0.dtype if x0.dtype == torch.float64 else torch.float32
        mine = self._local_samples
        for level in range(self.levels):
            source = generator("fixed draws", self.name, level)
            noise = torch.randn(self.samples, *x0.shape[1:], generator=source, dtype=dtype)
            for part in torch.split(mine, size) if len(mine) else ():
                clean = self.clean.rows(part * len(x0) // self.samples)
                yield (
                    level * self.samples + part,
                    self._noised(clean, noise[part], level, part, device),
                )

    def one_of_each_time(self) -> "FixedDraws":
        """Return as many draws at each level as it has times."""
        times = self.level_times
        first = LevelTimes(times.times[:, :BLOCKS], times.noise_levels, times.edges)
        return FixedDraws(self.name, self.clean, first, self.schedule)

    def gathered(self, parts: Sequence[Tensor], width: int, device: torch.device) -> Tensor:
        """Return numbers of this rank's draws as those of all ``(L, n, width)``, on the CPU.

        Args:
            parts: Numbers of each of its batches ``(rows, width)``; none where it has no draws.
            width: How many there are of each draw.
            device: Where ranks exchange them.
        """
        dtype = widest_float(device)
        own = torch.cat([torch.empty(0, width, dtype=dtype, device=device), *parts]).to(dtype)
        order = all_gather_rows(self.local_rows.to(device)).argsort()
        found = all_gather_rows(own)[order].cpu().double()
        return found.reshape(self.levels, self.samples, width)

    @property
    def _local_samples(self) -> Tensor:
        """Numbers of this rank's draws within each level."""
        return torch.arange(self.samples)[rank() :: world_size()]

    def _noised(
        self, clean: Clean, noise: Tensor, level: int, part: Tensor, device: torch.device
    ) -> Noised:
        clean = moved(clean, device)
        x0, noise = clean.x0.to(device, noise.dtype), noise.to(device)
        t = self.level_times.times[level, part].to(device)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return Noised(
            self.schedule.perturb(x0, noise, t),
            x0,
            noise,
            t,
            alpha,
            sigma,
            torch.ones_like(t),
            clean.group,
            clean.cond,
            clean.index,
            cond_group=clean.cond_group,
        )


def time_numbers(samples: int) -> Tensor:
    """Return which of its level's times each of so many draws has ``(n,)``."""
    draws = torch.arange(samples)
    return (draws // BLOCKS + draws) % BLOCKS


def block_means(values: Tensor) -> Tensor:
    """Return the means of draws ``(L, n, *)`` in each block, ``(L, blocks, *)``."""
    levels, samples, *rest = values.shape
    return values.reshape(levels, samples // BLOCKS, BLOCKS, *rest).mean(dim=1)


def moved(clean: Clean, device: torch.device) -> Clean:
    """Return clean samples on a device."""
    rows = mapped(tensors(clean), lambda x: x.to(device))
    return Clean(**rows)
