"""Densities of the time t as inverse CDFs.

``t = icdf(u)`` with u uniform on (0, 1), so that a stratified u gives a stratified t for every
density (the design of k-diffusion; Kingma et al. 2021, arXiv 2107.00630, do so for low variance).
Schedules are usually trained with these densities: uniform for VP, cosine, rectified flow and VE in
its log-uniform time (Song et al. 2021, arXiv 2011.13456); log-normal for EDM (Karras et al. 2022,
arXiv 2206.00364, table 1); logit-normal for rectified flow (Esser et al. 2024, arXiv 2403.03206).
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_vr.core.devices import widest_float
from lightning_vr.core.validation import check_at_least, check_finite_number, check_positive


class Density(nn.Module, ABC):
    """A density p(t) on an interval, given by its inverse CDF."""

    steps: int | None = None
    """Number of equally likely discrete timesteps that are drawn, or None."""

    changes_objective: bool = False
    """Whether it is there to train another objective than the schedule is usually trained with."""

    @abstractmethod
    def icdf(self, u: Tensor) -> Tensor:
        """Map uniform ``u`` in (0, 1) to times, element by element."""

    def middles(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the time in the middle of each of ``count`` equally likely bins ``(count,)``."""
        dtype = widest_float(torch.device(device))
        return self.icdf((torch.arange(count, device=device, dtype=dtype) + 0.5) / count)

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """Return the quantile of times, element by element; of a timestep, that of its middle."""

    @abstractmethod
    def log_prob(self, t: Tensor) -> Tensor:
        """Return log p(t), element by element; -inf outside the support."""

    def between(self, low: float, high: float) -> "Density":
        """Return the density restricted to the times between two of its quantiles."""
        return Truncated(self, low, high)

    def forward(self, u: Tensor) -> Tensor:
        """Return ``icdf(u)``."""
        return self.icdf(u)

    def extra_repr(self) -> str:
        """Say whether the objective is another one."""
        return "changes the objective" if self.changes_objective else ""


class Uniform(Density):
    """t uniform on ``[low, high]``.

    Args:
        low: Smallest time.
        high: Largest time.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        _check_interval(low, high)
        self.low, self.high = low, high

    def icdf(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u

    def cdf(self, t: Tensor) -> Tensor:
        return ((t - self.low) / (self.high - self.low)).clamp(0, 1)

    def log_prob(self, t: Tensor) -> Tensor:
        inside = (t >= self.low) & (t <= self.high)
        density = torch.full_like(t, -math.log(self.high - self.low))
        return torch.where(inside, density, -math.inf)

    def between(self, low: float, high: float) -> "Uniform":
        """Return the uniform density between two quantiles."""
        width = self.high - self.low
        return Uniform(self.low + low * width, self.low + high * width)


class LogUniform(Density):
    """log t uniform on ``[log low, log high]``: all orders of magnitude are equally likely.

    Args:
        low: Smallest time, positive.
        high: Largest time.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        _check_interval(low, high)
        check_positive("low", low)
        self.low, self.high = low, high

    def icdf(self, u: Tensor) -> Tensor:
        return self.low * (self.high / self.low) ** u

    def cdf(self, t: Tensor) -> Tensor:
        return (torch.log(t / self.low) / math.log(self.high / self.low)).clamp(0, 1)

    def log_prob(self, t: Tensor) -> Tensor:
        inside = (t >= self.low) & (t <= self.high)
        density = -torch.log(t) - math.log(math.log(self.high / self.low))
        return torch.where(inside, density, -math.inf)


class LogNormal(Density):
    """log t normal; EDM's density of the noise level (arXiv 2206.00364, table 1).

    Args:
        mean: Mean of log t.
        std: Standard deviation of log t.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__()
        _check_normal(mean, std)
        self.mean, self.std = mean, std

    def icdf(self, u: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, t: Tensor) -> Tensor:
        return _normal_cdf((torch.log(t) - self.mean) / self.std)

    def log_prob(self, t: Tensor) -> Tensor:
        density = _log_normal(torch.log(t), self.mean, self.std) - torch.log(t)
        return torch.where(t > 0, density, -math.inf)


class LogitNormal(Density):
    """logit t normal on (0, 1) (Esser et al. 2024, arXiv 2403.03206, equation 19).

    Args:
        mean: Mean of logit t.
        std: Standard deviation of logit t.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        _check_normal(mean, std)
        self.mean, self.std = mean, std

    def icdf(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, t: Tensor) -> Tensor:
        return _normal_cdf((torch.logit(t) - self.mean) / self.std)

    def log_prob(self, t: Tensor) -> Tensor:
        density = _log_normal(torch.logit(t), self.mean, self.std)
        density = density - torch.log(t) - torch.log1p(-t)
        return torch.where((t > 0) & (t < 1), density, -math.inf)


class Shifted(Density):
    """A density on (0, 1) whose times u become ``end shift u / (1 + (shift - 1) u)``.

    Under rectified flow a shift multiplies each noise level, which images of more pixels need
    (Esser et al. 2024, arXiv 2403.03206, equation 23). A shift other than 1 changes the objective;
    of ``LogitNormal`` it is ``LogitNormal(mean + log shift, std)``.

    Args:
        density: A density on (0, 1).
        shift: Factor on the noise level ``u / (1 - u)``; 1 changes nothing.
        end: The time at which u is 1; 1000 for most schedulers of diffusers.
    """

    def __init__(self, density: Density, shift: float = 1.0, end: float = 1.0) -> None:
        super().__init__()
        check_positive("shift", shift)
        check_positive("end", end)
        ends = density(torch.tensor([1e-3, 1 - 1e-3], dtype=torch.float64))
        if not 0 <= float(ends[0]) < float(ends[1]) <= 1:
            raise ValueError(
                f"`density` must draw times between 0 and 1, got {type(density).__name__}, which "
                f"draws {float(ends[0]):.3g} and {float(ends[1]):.3g}: use Uniform() or "
                f"LogitNormal()."
            )
        self.density, self.shift, self.end = density, shift, end
        self.changes_objective = shift != 1

    def icdf(self, u: Tensor) -> Tensor:
        inner = self.density.icdf(u)
        return self.end * (self.shift * inner / (1 + (self.shift - 1) * inner))

    def cdf(self, t: Tensor) -> Tensor:
        inner, _ = self._inner(t)
        return self.density.cdf(inner)

    def log_prob(self, t: Tensor) -> Tensor:
        inner, scale = self._inner(t)
        density = self.density.log_prob(inner) + math.log(self.shift / self.end)
        inside = (t >= 0) & (t <= self.end)
        return torch.where(inside, density - 2 * torch.log(scale), -math.inf)

    def _inner(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return u and what divides it, for t within the support or at its nearer end."""
        x = (t / self.end).clamp(0, 1)
        scale = self.shift * (1 - x) + x
        return x / scale, scale


class UniformSteps(Density):
    """t uniform on the integers ``low .. high - 1``, for a schedule that is a table.

    Args:
        timesteps: Number of training timesteps of the table.
        low: First timestep that is drawn.
        high: The timestep after the last one that is drawn; ``timesteps`` if not given.
    """

    def __init__(self, timesteps: int, low: int = 0, high: int | None = None) -> None:
        super().__init__()
        check_at_least("timesteps", timesteps, 1)
        high = timesteps if high is None else high
        if not 0 <= low < high <= timesteps:
            raise ValueError(
                f"`low` and `high` must satisfy 0 <= low < high <= {timesteps}, the number "
                f"of timesteps, got {low} and {high}: change one of them."
            )
        self.timesteps, self.low, self.high = timesteps, low, high
        self.steps: int = high - low

    def icdf(self, u: Tensor) -> Tensor:
        return self.low + torch.floor(u * self.steps).clamp(max=self.steps - 1)

    def cdf(self, t: Tensor) -> Tensor:
        return ((torch.floor(t) - self.low + 0.5) / self.steps).clamp(0, 1)

    def log_prob(self, t: Tensor) -> Tensor:
        inside = (t >= self.low) & (t < self.high) & (t == torch.floor(t))
        return torch.where(inside, torch.full_like(t, -math.log(self.steps)), -math.inf)

    def between(self, low: float, high: float) -> Density:
        """Return the density on the timesteps from one fraction of them to another, whole ones.

        That of a part that holds the middle of no timestep is the nearest one alone.
        """
        first = min(self.low + round(low * self.steps), self.high - 1)
        last = max(self.low + round(high * self.steps), first + 1)
        return UniformSteps(self.high, first, last)


class Truncated(Density):
    """A density restricted to the interval between two of its quantiles.

    ``log_prob`` is that of a continuous density. Of a table, a timestep that a quantile falls into
    counts in full.

    Args:
        density: The density on the whole interval.
        low: Quantile at the lower end.
        high: Quantile at the upper end.
    """

    def __init__(self, density: Density, low: float, high: float) -> None:
        super().__init__()
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"`low` and `high` must satisfy 0 <= low < high <= 1, got {low} and {high}: "
                f"change one of them."
            )
        self.density, self.low, self.high = density, low, high

    def icdf(self, u: Tensor) -> Tensor:
        inner = self.low + (self.high - self.low) * u
        eps = torch.finfo(inner.dtype).eps
        if self.high < 1 - 2 * eps:
            return self.density.icdf(inner)
        # rounded up to 1, it would be at infinity
        largest = 1 - eps / 2
        return self.density.icdf(torch.where(u < 1, inner.clamp(max=largest), inner))

    def cdf(self, t: Tensor) -> Tensor:
        return ((self.density.cdf(t) - self.low) / (self.high - self.low)).clamp(0, 1)

    def log_prob(self, t: Tensor) -> Tensor:
        edges = t.new_tensor([self.low, self.high], dtype=torch.float64)
        start, end = self.density.icdf(edges).to(t)
        density = self.density.log_prob(t) - math.log(self.high - self.low)
        return torch.where((t >= start) & (t <= end), density, -math.inf)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def _log_normal(x: Tensor, mean: float, std: float) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


def _check_interval(low: float, high: float) -> None:
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            f"`low` and `high` must be finite with low < high, got {low} and {high}: change one "
            f"of them."
        )


def _check_normal(mean: float, std: float) -> None:
    check_finite_number("mean", mean)
    check_positive("std", std)
