"""How far a network is from its optimum: the training loss less the part that no network removes.

At noise level s = sigma/alpha the regression target y is unbiased for the exact posterior mean D,
so that in x0 space the squared error splits without a cross term,

    E ‖x0_hat - y‖² = E ‖x0_hat - D(x_t)‖² + V(s),    V(s) = E ‖y - D(x_t)‖²

with V the target variance of ``variance.targets`` in x0 units squared: V_DSM, V_STF(n), or 0 where
the references are the whole data set. The loss of a draw is ``weight λ(t) ‖x0_hat - y‖² / d``; its
irreducible part is therefore ``weight λ(t) V(s) / d``, and the rest is the excess loss, 0 for the
exact denoiser and the same whatever the target: losses of different targets cannot be compared
before this part is taken off. The exact denoiser of a finite training set reproduces its samples;
at low noise a network that generalises keeps an excess over it.

V is interpolated at the noise level of each draw. It falls faster than any power of s at the low
end, so ``log(1 + V / floor)`` is what a monotone cubic (Fritsch and Carlson 1980) passes through
over log s: never negative, 0 where V is 0. Below the grid V falls on with the slope of its end:
held constant it would be blown up by ``λ ~ 1/s²``. Above the grid V is constant in x0 space. With
the usual 20 noise levels V is right to about 2 % in between (3 % where it bends most).

Standard errors. Draws of one step may share references, and in the far field their errors are one
and the same: the sums of a step make one block, and the variance is that between blocks
(linearised ratio, Kish's effective number n of blocks, factor ``n / (n - 1)``). The error of V,
which no number of draws removes, is added; noise levels share its draws, so it adds up linearly.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.distributed import all_reduce_sum, rank, ranks_save_together
from lightning_vr.variance.target_curves import MeasuredCurve, TargetVarianceCurve

_FLOOR = 1e-6
"""Share of the data's variance below which V counts as next to nothing: where the grid begins."""

_ROUNDING = 1e-9
"""By how much one block may seem to be more than one."""

_MEMORY = 0.8
"""What older sums keep at each ``advance``, so that means are over about the last five of them."""


class LossParts(NamedTuple):
    """Mean loss per dimension and its parts, over recent draws; NaN where there were none.

    Attributes:
        loss: Mean loss.
        irreducible: The part due to the variance of the target.
        excess: The rest: the distance from the optimum.
        excess_error: Standard error of the excess; NaN where one step alone has draws.
        draws: Number of draws, older ones counting less.
    """

    loss: Tensor
    irreducible: Tensor
    excess: Tensor
    excess_error: Tensor
    draws: Tensor


class IrreducibleVariance:
    """V(s), the variance of the training target in x0 units squared, at every noise level.

    A negative V_STF, which is noise of the measurement, counts as 0.

    Args:
        curve: Target variance of the whole training set, evenly spaced in the logarithm.
        references: Number of references of STF, or None for DSM.
        switch: Noise level below which STF is switched off.
    """

    def __init__(
        self, curve: TargetVarianceCurve, references: int | None = None, switch: float = 0.0
    ) -> None:
        dsm = curve.in_x0_space(curve.dsm)
        own = dsm if references is None else curve.in_x0_space(curve.stf[references])
        rows = [own.mean, own.mean + own.error, dsm.mean, dsm.mean + dsm.error]
        self.noise_levels = curve.noise_levels
        self.switch = switch
        self._floor = _FLOOR * float(dsm.mean.max()) or 1.0
        self._values = torch.log1p(torch.stack(rows).clamp(min=0) / self._floor)
        self._slopes = _monotone_slopes(self._values)
        self._log_levels = curve.noise_levels.log()

    def to(self, device: torch.device) -> "IrreducibleVariance":
        """Move to the device of the draws."""
        dtype = widest_float(device)
        self._values = self._values.to(device, dtype)
        self._slopes = self._slopes.to(device, dtype)
        self._log_levels = self._log_levels.to(device, dtype)
        return self

    def __call__(self, noise_level: Tensor) -> MeasuredCurve:
        """Return V and its standard error at noise levels ``(B,)``, which may be 0 or infinite."""
        tiny = torch.finfo(self._values.dtype).tiny
        log_level = noise_level.to(self._values).clamp(min=tiny).log()
        step = self._log_levels[1] - self._log_levels[0]
        position = (log_level - self._log_levels[0]) / step

        own, own_upper, dsm, dsm_upper = self._floor * torch.expm1(self._cubic(position))
        is_off = noise_level < self.switch
        mean = torch.where(is_off, dsm, own)
        return MeasuredCurve(mean, (torch.where(is_off, dsm_upper, own_upper) - mean).abs())

    def _cubic(self, position: Tensor) -> Tensor:
        """Interpolate at ``position (B,)`` in steps of the grid: ``(curves, B)``, 0 or more."""
        cell = position.floor().clamp(0, len(self._log_levels) - 2).to(torch.int64)
        start, rise = self._values[:, cell], self._values.diff(dim=1)[:, cell]
        left, right = self._slopes[:, cell], self._slopes[:, cell + 1]

        x = (position - cell).clamp(max=1)
        inside = x.clamp(min=0)
        bend = inside**2 * (3 * rise - 2 * left - right) + inside**3 * (left + right - 2 * rise)
        return (start + x * left + bend).clamp(min=0)


class ExcessLoss:
    """Sums of losses and their irreducible parts by noise level, on the device of the draws.

    The network changes while it trains: older sums fade at each ``advance``. Means are ratios of
    faded sums. Bins lie around the noise levels of the curve, the outermost ones open, so that
    every draw counts. No step waits for the device.

    Args:
        variance: V at every noise level.
        state: What ``state`` returned, to go on from there.
    """

    def __init__(
        self, variance: IrreducibleVariance, state: dict[str, Tensor] | None = None
    ) -> None:
        levels = variance.noise_levels
        self.noise_levels = levels
        self._variance = variance
        self._edges = (levels[:-1] * levels[1:]).sqrt()
        self._sums = levels.new_zeros(7, len(levels) + 1)
        self._recent = torch.zeros_like(self._sums)
        if state is not None:
            self._sums = state["sums"]
            # every rank loads what rank 0 saved, and `advance` sums over the ranks
            self._recent = state["recent"] if rank() == 0 else self._recent

    def to(self, device: torch.device) -> "ExcessLoss":
        """Move to the device of the draws."""
        dtype = widest_float(device)
        self._variance.to(device)
        self._edges = self._edges.to(device, dtype)
        self._recent = self._recent.to(device, dtype)
        return self

    def add(self, noise_level: Tensor, loss: Tensor, scale: Tensor) -> None:
        """Add the draws of one step, but none whose loss is not finite.

        Args:
            noise_level: ``sigma / alpha`` of each draw ``(B,)``.
            loss: Weighted loss of each draw ``(B,)``, per dimension.
            scale: Loss per squared error in x0 space, ``weight λ(t) / d``, ``(B,)``.
        """
        bins = torch.bucketize(noise_level.to(self._edges), self._edges)
        loss, scale = loss.to(self._recent), scale.to(self._recent)
        variance, error = self._variance(noise_level)
        values = torch.stack([torch.ones_like(loss), loss, scale * variance, scale * error])
        values = torch.where(values.isfinite().all(dim=0), values, 0)

        by_level = self._recent.new_zeros(4, len(self.noise_levels)).index_add_(1, bins, values)
        block = torch.cat([by_level, by_level.sum(dim=1, keepdim=True)], dim=1)
        draws, excess = block[0], block[1] - block[2]
        squares = torch.stack([draws**2, draws * excess, excess**2])
        self._recent = self._recent + torch.cat([block, squares])

    def advance(self) -> None:
        """Let older sums fade and take in those since the last call, over all ranks: a collective.

        A draw of weight w adds w to sums and w² to sums of squares.
        """
        recent = all_reduce_sum(self._recent)
        self._recent = torch.zeros_like(recent)
        memory = self._sums.new_tensor([_MEMORY] * 4 + [_MEMORY**2] * 3)
        self._sums = memory[:, None] * self._sums + recent.to(self._sums)

    def by_level(self) -> LossParts:
        """Return the parts of the loss at each noise level ``(L,)``, as of the last ``advance``."""
        return _parts(self._sums[:, :-1])

    def total(self) -> LossParts:
        """Return the parts over all draws, noise levels as often as training visits them."""
        return _parts(self._sums[:, -1])

    def state(self) -> dict[str, Tensor]:
        """Return the sums of all ranks, on the CPU; all must call it."""
        recent = all_reduce_sum(self._recent) if ranks_save_together() else self._recent
        return {"sums": self._sums, "recent": recent.cpu().clone()}


def _parts(sums: Tensor) -> LossParts:
    draws, loss, irreducible, irreducible_error, squares, cross, excess_squares = sums
    excess = (loss - irreducible) / draws
    # rounding may take the sum of squares of equal blocks below 0
    between = (excess_squares - 2 * excess * cross + excess**2 * squares).clamp(min=0)
    blocks = draws**2 / squares
    beyond_one = torch.where(blocks - 1 > _ROUNDING, blocks - 1, torch.nan)
    variance = between / draws**2 * blocks / beyond_one
    error = torch.hypot(variance.sqrt(), irreducible_error / draws)
    return LossParts(loss / draws, irreducible / draws, excess, error, draws)


def _monotone_slopes(values: Tensor) -> Tensor:
    """Return slopes at evenly spaced nodes ``(curves, L)`` that keep a cubic between its nodes."""
    rise = values.diff(dim=1)
    left, right = rise[:, :-1], rise[:, 1:]
    steepest = 3 * torch.minimum(left.abs(), right.abs())
    central = torch.clamp((left + right) / 2, -steepest, steepest)
    inner = torch.where(left * right > 0, central, 0)
    # V falls towards low noise: a slope the other way is noise, and would be followed to infinity
    return torch.cat([rise[:, :1].clamp(min=0), inner, rise[:, -1:]], dim=1)
