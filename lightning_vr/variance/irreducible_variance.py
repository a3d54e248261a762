"""The part of the training loss that no network removes, at every noise level.

It follows from V(s), the variance of the regression target in x0 units squared, as it was measured
on a grid (``variance.target_measurement``).

V is interpolated at the noise level of each draw. It falls faster than any power of s at the low
end, so a monotone cubic (Fritsch and Carlson 1980) over log s passes through
``log(1 + V / floor)``: it is never negative, and 0 where V is 0. Below the grid V continues to fall
with the slope at its end: a constant would be blown up by ``λ ~ 1/s²``. Above the grid V is
constant in x0 space. With the usual 20 noise levels V is right to about 2 % in between (3 % where
it bends most).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.variance.target_curves import TargetVarianceCurve

_FLOOR = 1e-6
"""Fraction of the data's variance below which V is negligible: where the grid begins."""


class IrreducibleParts(NamedTuple):
    """Variance of the target at noise levels ``(B,)``, in x0 units squared.

    Attributes:
        mean: V of the training target.
        error: Its standard error.
        dsm: V of the plain target.
    """

    mean: Tensor
    error: Tensor
    dsm: Tensor


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

    def __call__(self, noise_level: Tensor) -> IrreducibleParts:
        """Return V, its error and V_DSM at noise levels ``(B,)``, which may be 0 or infinite."""
        tiny = torch.finfo(self._values.dtype).tiny
        log_level = noise_level.to(self._values).clamp(min=tiny).log()
        step = self._log_levels[1] - self._log_levels[0]
        position = (log_level - self._log_levels[0]) / step

        own, own_upper, dsm, dsm_upper = self._floor * torch.expm1(self._cubic(position))
        is_off = noise_level < self.switch
        mean = torch.where(is_off, dsm, own)
        error = (torch.where(is_off, dsm_upper, own_upper) - mean).abs()
        return IrreducibleParts(mean, error, dsm)

    def _cubic(self, position: Tensor) -> Tensor:
        """Interpolate at ``position (B,)`` in steps of the grid: ``(curves, B)``, 0 or more."""
        cell = position.floor().clamp(0, len(self._log_levels) - 2).to(torch.int64)
        start, rise = self._values[:, cell], self._values.diff(dim=1)[:, cell]
        left, right = self._slopes[:, cell], self._slopes[:, cell + 1]

        x = (position - cell).clamp(max=1)
        inside = x.clamp(min=0)
        bend = inside**2 * (3 * rise - 2 * left - right) + inside**3 * (left + right - 2 * rise)
        return (start + x * left + bend).clamp(min=0)


def _monotone_slopes(values: Tensor) -> Tensor:
    """Return slopes at evenly spaced nodes ``(curves, L)`` that keep a cubic between its nodes."""
    rise = values.diff(dim=1)
    left, right = rise[:, :-1], rise[:, 1:]
    steepest = 3 * torch.minimum(left.abs(), right.abs())
    central = torch.clamp((left + right) / 2, -steepest, steepest)
    inner = torch.where(left * right > 0, central, 0)
    # V falls towards low noise: a slope the other way is noise, and would be extended to infinity
    return torch.cat([rise[:, :1].clamp(min=0), inner, rise[:, -1:]], dim=1)
