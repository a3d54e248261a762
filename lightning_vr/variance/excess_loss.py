"""How far a network is from its optimum: the training loss less the part that no network removes.

At noise level s = sigma/alpha the regression target y is unbiased for the exact posterior mean D,
so that in x0 space the squared error splits without a cross term,

    E ‖x0_hat - y‖² = E ‖x0_hat - D(x_t)‖² + V(s),    V(s) = E ‖y - D(x_t)‖²

with V the target variance of ``variance.target_measurement`` in x0 units squared: V_DSM, V_STF(n),
or 0 where the references are the whole data set. The loss of a draw is
``weight λ(t) ‖x0_hat - y‖² / d``. Its irreducible part is therefore ``weight λ(t) V(s) / d``, and
the rest is the excess loss: 0 for the exact denoiser, and the same whatever the target. Losses of
different targets cannot be compared before the irreducible part is subtracted. The exact denoiser
of a finite training set reproduces its samples; at low noise a network that generalises keeps an
excess over it.

Standard errors. Draws of one step may share references, and in the far field all their errors are
the same: the sums of a step make one block, and the variance is that between blocks (linearised
ratio, Kish's effective number n of blocks, factor ``n / (n - 1)``). The error of V, which no number
of draws removes, is added; noise levels share its draws, so it adds up linearly.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_vr.variance.irreducible_variance import IrreducibleVariance
from lightning_vr.variance.noise_level_sums import NoiseLevelSums

_ROUNDING = 1e-9
"""By how much rounding may make one block seem to be more than one."""

_MEMORY = 0.8
"""Factor on older sums at each ``advance``, so that means are over about the last five of them."""


class LossParts(NamedTuple):
    """Mean loss per dimension and its parts, over recent draws; NaN where there were none.

    Attributes:
        loss: Mean loss.
        irreducible: The part due to the variance of the target.
        irreducible_dsm: What that part would be with the plain target.
        excess: The rest: the distance from the optimum.
        excess_error: Standard error of the excess; NaN where one step alone has draws.
        draws: Number of draws, older ones counting less.
    """

    loss: Tensor
    irreducible: Tensor
    irreducible_dsm: Tensor
    excess: Tensor
    excess_error: Tensor
    draws: Tensor


class ExcessLoss(NoiseLevelSums):
    """Sums of losses and their irreducible parts by noise level.

    The network changes while it trains: older sums fade at each ``advance``. Means are ratios of
    faded sums. Bins lie around the noise levels of the curve, the outermost ones open, so that
    every draw counts. The last column holds the sums over all noise levels.

    Args:
        variance: V at every noise level.
        state: What ``state`` returned, to continue from there.
    """

    def __init__(
        self, variance: IrreducibleVariance, state: dict[str, Tensor] | None = None
    ) -> None:
        levels = variance.noise_levels
        edges = (levels[:-1] * levels[1:]).sqrt()
        super().__init__(levels, edges, 8, len(levels) + 1, state)
        self._variance = variance

    def to(self, device: torch.device) -> "ExcessLoss":
        """Move to the device of the draws."""
        self._variance.to(device)
        return super().to(device)

    def add(self, noise_level: Tensor, loss: Tensor, scale: Tensor) -> None:
        """Add the draws of one step, except those whose loss is not finite.

        Args:
            noise_level: ``sigma / alpha`` of each draw ``(B,)``.
            loss: Weighted loss of each draw ``(B,)``, per dimension.
            scale: Loss per squared error in x0 space, ``weight λ(t) / d``, ``(B,)``.
        """
        loss, scale = loss.to(self._recent), scale.to(self._recent)
        variance, error, dsm = (scale * part for part in self._variance(noise_level))
        values = torch.stack([torch.ones_like(loss), loss, variance, error, dsm])
        values = torch.where(values.isfinite().all(dim=0), values, 0)

        by_level = self._recent.new_zeros(5, len(self.noise_levels))
        by_level.index_add_(1, self._bins(noise_level), values)
        block = torch.cat([by_level, by_level.sum(dim=1, keepdim=True)], dim=1)

        draws, excess = block[0], block[1] - block[2]
        squares = torch.stack([draws**2, draws * excess, excess**2])
        self._recent = self._recent + torch.cat([block, squares])

    def advance(self) -> None:
        """Let older sums fade and add those since the last call, over all ranks: a collective.

        A draw of weight w adds w to sums and w² to sums of squares.
        """
        memory = self._sums.new_tensor([_MEMORY] * 5 + [_MEMORY**2] * 3)
        self._sums = memory[:, None] * self._sums + self._collect_recent()

    @property
    def is_empty(self) -> bool:
        """Whether no draws have been added before the last ``advance``."""
        return not bool(self._sums.any())

    def by_level(self) -> LossParts:
        """Return the parts of the loss at each noise level ``(L,)``, as of the last ``advance``."""
        return _parts(self._sums[:, :-1])

    def total(self) -> LossParts:
        """Return the parts over all draws, noise levels as often as training visits them."""
        return _parts(self._sums[:, -1])


def _parts(sums: Tensor) -> LossParts:
    draws, loss, irreducible, irreducible_error, dsm, squares, cross, excess_squares = sums
    excess = (loss - irreducible) / draws
    # rounding may take the sum of squares of equal blocks below 0
    between = (excess_squares - 2 * excess * cross + excess**2 * squares).clamp(min=0)
    blocks = draws**2 / squares
    beyond_one = torch.where(blocks - 1 > _ROUNDING, blocks - 1, torch.nan)
    variance = between / draws**2 * blocks / beyond_one
    error = torch.hypot(variance.sqrt(), irreducible_error / draws)
    parts = (loss / draws, irreducible / draws, dsm / draws)
    return LossParts(*parts, excess, error, draws)
