"""Coefficients and gate of a control variate, from gradients that earlier pilots measured.

Let g be the gradient of the loss of an optimizer step and c that of a term whose mean is zero, both
only of the draws in one bin of the noise level. Then

    β = E⟨g, c⟩ / E‖c‖²,        Var(g - β c) = Var g - 2 β E⟨g, c⟩ + β² E‖c‖²

(Jeha, Grathwohl, Andersen, Ek and Frellsen 2024, arXiv 2408.12270). The coefficient that minimises
the variance of the loss is a different one, and unrelated. As E c = 0 both means are inner products
of gradients of batches: no gradient of a single draw is needed. Bins, and the odd and the even part
in each, have coefficients of their own. Those of both parts are fitted together: the product of the
parts has mean zero, but at low noise the odd part is so much larger that, fitted alone, the even
part's coefficient would only show what the two happen to have in common. Sums decay from pilot to
pilot. A coefficient never depends on the noise that it scales, so the gradient stays unbiased.

The gate opens the bins that pay for the time that they cost. In the noise-ratio model (McCandlish
et al. 2018, arXiv 1812.06162) training takes ``1 + V / ‖E g‖²`` times as many steps as without
noise, where V is the variance of a step's gradient; so the open bins are those that minimise

    E‖g‖² · seconds of a step,        E‖g‖² = ‖E g‖² + V.

What a bin subtracts is measured with the coefficients of the pilots before, which training used: a
coefficient that is judged by the gradients that it was fitted to looks better than it is.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_MEMORY = 0.7
"""Weight of all earlier pilots at each new one."""

_LEAST_REST = 0.1
"""Lower bound on the part of ``E‖g‖²`` without noise, over the noise: estimates are noisy."""

_ROUNDING = 1e-8
"""Fraction of ``‖g‖²`` below which ``‖c‖²`` is rounding: antithetic pairs cancel the odd part."""

_LEAST_CHANGE = 1.02
"""Predicted gain over the bins that are open now below which these stay open."""

_RIDGE = 1e-6
"""Added to the diagonal of the products of the parts, which is scaled to 1."""

_LEAST_SAVING = 1.05
"""Predicted factor on training time below which all bins stay closed."""


class PilotStatistics(NamedTuple):
    """What one pilot measures in b bins for k parts; float64.

    Attributes:
        products: ``⟨g, c_k⟩`` of each bin's part of a step's gradient ``(b, k)``.
        squares: ``⟨c_k, c_l⟩`` ``(b, k, k)``.
        loss_squares: ``E‖g - E[g | x, t]‖²``, what the noise adds to ``E‖g‖²`` of a step ``(b,)``.
        second_moment: ``E‖g‖²`` of the whole gradient of a step ``()``.
        fraction: Fraction of draws in each bin ``(b,)``.
        value_products: Sums of ``L (C - E C)`` over the draws in each bin, where L is the loss
            minus its mean in the bin ``(b,)``.
        value_squares: Sums of ``(C - E C)²`` ``(b,)``.
    """

    products: Tensor
    squares: Tensor
    loss_squares: Tensor
    second_moment: Tensor
    fraction: Tensor
    value_products: Tensor
    value_squares: Tensor

    @classmethod
    def zeros(cls, bins: int, parts: int) -> "PilotStatistics":
        """Return zeros."""
        shapes = [(bins, parts), (bins, parts, parts), (bins,), (), *[(bins,)] * 3]
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


class Cost(NamedTuple):
    """Seconds that a control variate adds to a step, over those of a step without it.

    Attributes:
        fixed: Cost of running it at all.
        marginal: Cost of running it for all draws; it is proportional to the fraction of draws.
    """

    fixed: float
    marginal: float


class DeviceCopy:
    """Caches the copy of a tensor on a device until another tensor replaces the first.

    A copy from the CPU makes the host wait for the device. The cache is not state: checkpoints,
    deep copies and other processes start without it.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, torch.device, torch.dtype, Tensor] | None = None

    def of(self, source: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return ``source.to(device, dtype)``, which must not be changed in place."""
        if self._kept is None or self._kept[0] is not source or self._kept[1:3] != (device, dtype):
            self._kept = source, device, dtype, source.to(device, dtype)
        return self._kept[3]

    def __reduce__(self) -> tuple[type["DeviceCopy"], tuple[()]]:
        return DeviceCopy, ()


class ControlFit:
    """Coefficients and open bins, on the CPU, in float64, and the same on all ranks.

    Args:
        bins: Number of bins.
        on_values: Whether the coefficient is that of the loss value, one for all parts.
        coefficient: A fixed coefficient, instead of fitted ones.

    Attributes:
        coefficients: β ``(bins, parts)``, or ``(bins, 1)`` where one holds for all parts; 1 until a
            pilot has measured, which is optimal for a network that has learned nothing.
        is_open: Which bins pay ``(bins,)``; none until a pilot has measured. All bins close only
            if two pilots in a row find that none pays.
        predicted_speedup: Predicted factor on training time of the open bins.
        cost: What the control variate costs, or None.
    """

    def __init__(self, bins: int, *, on_values: bool, coefficient: float | None) -> None:
        self.on_values, self.fixed = on_values, coefficient
        start = 1.0 if coefficient is None else coefficient
        self.coefficients = torch.full((bins, 1), start, dtype=torch.float64)
        self.is_open = torch.zeros(bins, dtype=torch.bool)
        self.predicted_speedup = 1.0
        self.cost: Cost | None = None
        self._sums: PilotStatistics | None = None
        self._weight = 0.0
        self._close_pending = False
        self._reduction = torch.zeros(bins, dtype=torch.float64)

    def add(self, found: PilotStatistics) -> bool:
        """Add a pilot's statistics, the same on all ranks: first judge, then fit.

        Returns:
            Whether they were finite; otherwise they are left out.
        """
        if not all(bool(torch.isfinite(x).all()) for x in found):
            return False
        beta = self.coefficients.expand_as(found.products)
        square = torch.einsum("bk,bkl,bl->b", beta, found.squares, beta)
        reduction = 2 * (beta * found.products).sum(dim=1) - square
        self._reduction = _MEMORY * self._reduction + reduction
        self._weight = _MEMORY * self._weight + 1
        if self._sums is not None:
            pairs = zip(self._sums, found, strict=True)
            found = PilotStatistics(*(_MEMORY * old + new for old, new in pairs))
        self._sums = found
        if self.fixed is None:
            self.coefficients = self._on_values() if self.on_values else self._on_gradients()
        if self.cost is not None:
            self._choose(self.cost)
        return True

    @property
    def reductions(self) -> Tensor:
        """Fraction of ``E‖g‖²`` of a step that each bin removes if it is open ``(bins,)``.

        They cannot remove the part that samples, times and the mean gradient have in it.
        """
        if self._sums is None:
            return torch.zeros_like(self._reduction)
        noise = self._sums.loss_squares.sum()
        rest = self._sums.second_moment - noise
        return self._reduction / (noise + rest.clamp(min=_LEAST_REST * noise))

    @property
    def fractions(self) -> Tensor:
        """Fraction of draws in each bin ``(bins,)``."""
        if self._sums is None:
            return torch.full_like(self._reduction, 1 / len(self._reduction))
        return self._sums.fraction / self._weight

    def state(self) -> dict[str, Any]:
        """Return all that has been learned, as numbers, for the checkpoint."""
        return {
            "coefficients": self.coefficients.tolist(),
            "is_open": self.is_open.tolist(),
            "saving": self.predicted_speedup,
            "cost": self.cost and list(self.cost),
            "sums": self._sums and [x.tolist() for x in self._sums],
            "weight": self._weight,
            "close_pending": self._close_pending,
            "reduction": self._reduction.tolist(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Load what ``state`` returned for as many bins; a fixed coefficient stays."""
        if self.fixed is None:
            self.coefficients = torch.tensor(state["coefficients"], dtype=torch.float64)
        self.is_open, self.predicted_speedup = torch.tensor(state["is_open"]), state["saving"]
        self.cost = state["cost"] and Cost(*state["cost"])
        sums = state["sums"]
        self._sums = sums and PilotStatistics(*(torch.tensor(x, dtype=torch.float64) for x in sums))
        self._weight, self._close_pending = state["weight"], state["close_pending"]
        self._reduction = torch.tensor(state["reduction"], dtype=torch.float64)

    def _on_gradients(self) -> Tensor:
        assert self._sums is not None
        squares, products = self._sums.squares, self._sums.products
        own = squares.diagonal(dim1=1, dim2=2)
        is_known = own > _ROUNDING * self._sums.loss_squares[:, None]
        # scaled, so that one ridge fits parts of all sizes
        scale = is_known / torch.where(is_known, own, 1.0).sqrt()
        matrix = squares * scale[..., None] * scale[..., None, :]
        ridge = torch.where(is_known, _RIDGE, 1.0)
        beta: Tensor = torch.linalg.solve(matrix + torch.diag_embed(ridge), products * scale)
        return beta * scale

    def _on_values(self) -> Tensor:
        assert self._sums is not None
        squares = self._sums.value_squares
        ratio = self._sums.value_products / torch.where(squares > 0, squares, 1.0)
        return torch.where(squares > 0, ratio, 0.0)[:, None]

    def _choose(self, cost: Cost) -> None:
        """Open the bins with the largest predicted saving, in order of their gain per draw."""
        order = (self.reductions / self.fractions.clamp(min=1e-12)).argsort(descending=True)
        left = 1 - self.reductions[order].cumsum(dim=0)
        seconds = 1 + cost.fixed + cost.marginal * self.fractions[order].cumsum(dim=0)
        savings = 1 / (left * seconds)
        best = int(savings.argmax())
        chosen = torch.zeros_like(self.is_open)
        if float(savings[best]) > _LEAST_SAVING:
            chosen[order[: best + 1]] = True
        # bins that neither save nor cost would open and close with the noise of pilots
        is_better = self._saving(chosen, cost) > _LEAST_CHANGE * self._saving(self.is_open, cost)
        # a closed gate learns less often: one pilot of few draws is not enough to close it
        closes_all = is_better and not bool(chosen.any())
        if is_better and (self._close_pending or not closes_all):
            self.is_open = chosen
        self._close_pending = closes_all and bool(self.is_open.any())
        is_closed = not bool(self.is_open.any())
        self.predicted_speedup = (
            float(savings[best]) if is_closed else self._saving(self.is_open, cost)
        )

    def _saving(self, is_open: Tensor, cost: Cost) -> float:
        """Return the predicted factor on training time of some bins."""
        if not bool(is_open.any()):
            return 1.0
        left = 1 - self.reductions[is_open].sum()
        return float(1 / (left * (1 + cost.fixed + cost.marginal * self.fractions[is_open].sum())))
