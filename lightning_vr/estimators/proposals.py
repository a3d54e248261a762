"""Proposals q(t): where to draw times, in place of the density p(t) of the loss.

Importance sampling draws t from q and weighs the draw by p/q, which leaves the mean of the loss and
of its gradient as it is for every q that is positive wherever the weighted loss is. Weights are
plain, never self-normalised: that would be biased. The variance is least for

    q*(t) ∝ p(t) sqrt( E[ ‖g‖² | t ] )

(Bettencourt, Wu, Atzmon, Lucas and Lorraine 2026, arXiv 2605.21489, equation 24). Two ways to
approximate it: the known weight of the loss stands for the size of the gradient (their proposal,
``WeightProposal``), or that size is learned (``LearnedProposal``, after Nichol and Dhariwal 2021,
arXiv 2102.09672, section 3.3, who use the loss).

All of them are densities ``h(v) = q/p`` over the quantiles v of p, so that one table in float64
serves continuous times and discrete timesteps, and ``t = p.icdf(h.icdf(u))`` stratifies as u does.
What is drawn is v, with the weight ``1 / h(v)`` by the same table that it is drawn from: the
estimate is unbiased up to rounding, however coarse the table is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_vr.core.distributed import all_reduce_sum
from lightning_vr.core.types import Times
from lightning_vr.core.validation import check_at_least, check_choice
from lightning_vr.estimators.slot import warn_of_dropped_state
from lightning_vr.process.objective import Objective, WeightedTimes
from lightning_vr.process.quantile_density import TINY, QuantileDensity
from lightning_vr.process.timesteps import Truncated

Moment = Literal["gradient", "loss", "bound"]

_TABLE_SIZE = 4096
_TABLE_REACH = 33.0
"""Logit of the last quantile: 5e-15 of p lie beyond, near the resolution of float64 at 1."""

_LEAST_SEEN = 8
"""Draws that every bin must have had before a learned proposal is used."""


class Proposal(nn.Module, ABC):
    """A density q(t) to draw times from."""

    @abstractmethod
    def density(self, objective: WeightedTimes, device: torch.device) -> QuantileDensity:
        """Return q/p over the quantiles of ``objective.timesteps``, in float64 on a device."""

    def forward(self, objective: WeightedTimes, device: torch.device) -> QuantileDensity:
        """Return ``density``, or that of a part of the times."""
        if objective.parent is not None:
            # times that were truncated from the start have no parent: bins and quantiles are theirs
            part = objective.timesteps
            assert isinstance(part, Truncated)
            whole: QuantileDensity = self(objective.parent, device)
            return whole.between(part.low, part.high)
        return self.density(objective, device)

    def check(self, objective: WeightedTimes) -> None:
        """Raise if the proposal is zero where the weighted loss is not.

        Raises:
            ValueError: With the times at which it is.
        """
        h = self(objective, torch.device("cpu"))
        # within cells too: in a coarse table the loss may be nonzero in only a part of one
        parts = max(1, _TABLE_SIZE // len(h.left))
        share = (torch.arange(parts, dtype=h.edges.dtype) + 0.5) / parts
        v = torch.lerp(h.edges[:-1, None], h.edges[1:, None], share).flatten()
        t = objective.timesteps.icdf(v)
        missed = (h(v) <= 0) & (objective.weight(t) > 0)
        if bool(missed.any()):
            first, last = (float(x) for x in t[missed][[0, -1]])
            raise ValueError(
                f"`proposal` must be positive wherever the weighted loss is, got a "
                f"{type(self).__name__} that is zero at times from {first:.4g} to {last:.4g}: mix "
                f"in some of the base density, as times that are never drawn are never learned."
            )

    def observe(self, v: Tensor, weight: Tensor, loss: Tensor, bound: Tensor | None = None) -> None:
        """Observe the draws of a micro-step.

        Args:
            v: Quantiles of p at which they are ``(n,)``.
            weight: Weight ``λ b²`` of each ``(n,)``.
            loss: Weighted loss of each, without its importance weight ``(n,)``.
            bound: Term of a learned variance of each, likewise, or None.
        """

    def observe_moment(self, v: Tensor, moment: Tensor) -> None:
        """Observe the size of the gradient of draws.

        Args:
            v: Quantiles of p at which they are ``(n,)``.
            moment: Squared size of each gradient, without its importance weight ``(n,)``.
        """

    def advance(self) -> None:
        """Learn from what all ranks have observed; all must call it, after the optimizer step."""


class WeightProposal(Proposal):
    """q ∝ p λ b²: the loss weight stands for the size of the gradient.

    The product of loss weight and p/q, computed as one number, is then the same for all draws, so
    that no weight explodes: exactly for discrete timesteps, otherwise up to the resolution of the
    table. It costs nothing and learns nothing. If the weight on the network's own error does not
    depend on t, as by default, it is the base density. In score distillation it saves 94 to 97 % of
    what the best q would save (Bettencourt et al. 2026).
    """

    def __init__(self) -> None:
        super().__init__()
        self._table: tuple[WeightedTimes, torch.device, QuantileDensity] | None = None

    def density(self, objective: WeightedTimes, device: torch.device) -> QuantileDensity:
        if self._table is None or self._table[:2] != (objective, device):
            self._table = objective, device, self._tabulate(objective, device)
        return self._table[2]

    def _tabulate(self, objective: WeightedTimes, device: torch.device) -> QuantileDensity:
        steps = objective.timesteps.steps
        if steps is not None:
            edges = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=device)
            heights = _weights(objective, objective.timesteps.icdf(0.5 * (edges[1:] + edges[:-1])))
            return QuantileDensity(edges, heights)
        # evenly spaced in the logit, to resolve both tails of p: weights may be unbounded there
        logits = torch.linspace(
            -_TABLE_REACH, _TABLE_REACH, _TABLE_SIZE + 1, dtype=torch.float64, device=device
        )
        edges = torch.sigmoid(logits)
        heights = _weights(objective, objective.timesteps.icdf(edges))
        edges[0], edges[-1] = 0, 1
        return QuantileDensity(edges, heights[:-1], heights[1:])


class TableProposal(Proposal):
    """q given as a table over equally likely bins of p.

    Args:
        probabilities: Probability of each of n bins between quantiles i/n and (i + 1)/n of p; for n
            discrete timesteps, of each timestep. Any scale.
    """

    def __init__(self, probabilities: Sequence[float]) -> None:
        super().__init__()
        if not probabilities or min(probabilities) < 0 or not 0 < sum(probabilities) < torch.inf:
            raise ValueError(
                f"`probabilities` must be finite, not negative and not all zero, got "
                f"{probabilities}: give each bin a number of 0 or more."
            )
        self.probabilities = list(probabilities)

    def density(self, objective: WeightedTimes, device: torch.device) -> QuantileDensity:
        heights = torch.tensor(self.probabilities, dtype=torch.float64, device=device)
        return QuantileDensity.histogram(heights)


class LearnedProposal(Proposal):
    """q ∝ p sqrt(second moment) in bins, learned while training, over a floor of p.

    The second moment is an average that decays over optimizer steps. Each step draws from the table
    before the step, which keeps the estimate unbiased, and all ranks have the same table. The
    proposal is p until every bin has had 8 draws.

    Args:
        moment: Second moment of what. ``"gradient"``: the gradient of a draw's loss with respect to
            the network's output, ``(λ b²)² ‖error‖²``. ``"loss"``: the loss, as in Improved DDPM.
        bins: Number of equally likely bins of p.
        floor: Fraction of draws from p itself, so that no importance weight exceeds ``1 / floor``.
        memory: Factor on all earlier sums at each optimizer step.
    """

    def __init__(
        self,
        moment: Moment = "gradient",
        bins: int = 32,
        floor: float = 0.1,
        memory: float = 0.99,
    ) -> None:
        super().__init__()
        check_choice("moment", moment, get_args(Moment))
        check_at_least("bins", bins, 1)
        if not 0 < floor <= 1:
            raise ValueError(
                f"`floor` must be above 0 and at most 1, got {floor}: use a small fraction, such "
                f"as 0.1, as bins that are never drawn are never learned."
            )
        if not 0 < memory < 1:
            raise ValueError(
                f"`memory` must be between 0 and 1, got {memory}: use a number just below 1."
            )
        self.moment: Moment = moment
        self.bins = bins
        self.floor = floor
        self.memory = memory
        # rows: sums of second moments, their counts, number of all draws so far
        # not buffers: weight averaging would average them, and low precision would round them
        self.table = torch.zeros(3, bins, dtype=torch.float64)
        self.observed = torch.zeros(2, bins, dtype=torch.float64)

    def density(self, objective: WeightedTimes, device: torch.device) -> QuantileDensity:
        sums, counts, seen = self.table.to(device)
        size = (sums / counts.clamp(min=TINY)).sqrt()
        is_known = (seen >= _LEAST_SEEN).all() & (size.sum() > 0)
        shape = torch.where(is_known, size / size.mean().clamp(min=TINY), torch.ones_like(size))
        return QuantileDensity.histogram((1 - self.floor) * shape + self.floor)

    def second_moments(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """Return noise levels and what was learned at each, for ``Objective.split``, ``(bins,)``.

        Raises:
            ValueError: If what was learned is no gradient, or a bin has had too few draws.
        """
        if self.moment != "gradient":
            raise ValueError(
                f"`moment` must be 'gradient' for second moments of gradients, got "
                f"{self.moment!r}: learn them by LearnedProposal(moment='gradient')."
            )
        sums, counts, seen = self.table.cpu()
        if bool((seen < _LEAST_SEEN).any()):
            raise ValueError(
                f"Every bin must have had {_LEAST_SEEN} draws for its second moment, got "
                f"{int(seen.min())} in one: train longer, or use fewer bins."
            )
        levels = objective.noise_levels(self.bins).cpu()
        order = levels.argsort()
        return levels[order], (sums / counts)[order]

    def check(self, objective: WeightedTimes) -> None:
        steps = objective.timesteps.steps
        if steps is not None and steps < self.bins:
            raise ValueError(
                f"`bins` must be at most {steps}, the number of timesteps, got {self.bins}: use "
                f"fewer, as a bin without a timestep is never drawn."
            )
        super().check(objective)

    def observe(self, v: Tensor, weight: Tensor, loss: Tensor, bound: Tensor | None = None) -> None:
        if self.moment == "bound":
            assert bound is not None, "a model without a learned variance is refused"
            self.observe_moment(v, bound**2)
        else:
            self.observe_moment(v, weight * loss if self.moment == "gradient" else loss**2)

    def observe_moment(self, v: Tensor, moment: Tensor) -> None:
        self.table, self.observed = self.table.to(v.device), self.observed.to(v.device)
        bins = (v * self.bins).long().clamp(0, self.bins - 1)
        moment = moment.to(self.observed)
        seen = torch.where(moment.isfinite(), torch.stack([moment, torch.ones_like(moment)]), 0)
        self.observed.index_add_(1, bins, seen)

    def advance(self) -> None:
        moments, counts = all_reduce_sum(self.observed)
        faded = self.memory * self.table[:2] + torch.stack([moments, counts])
        self.table = torch.cat([faded, (self.table[2] + counts)[None]])
        self.observed = torch.zeros_like(self.observed)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what was learned, for the checkpoint."""
        return {"moment": self.moment, "table": self.table, "observed": self.observed}

    def state_over_ranks(self, mean: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the state for a checkpoint within an accumulation window.

        Ranks share what they have observed once in each optimizer step. Until then each rank has
        draws of its own, and a checkpoint keeps their mean.

        Args:
            mean: Returns the mean of a tensor over the ranks.
        """
        return self.get_extra_state() | {"observed": mean(self.observed)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load what was learned, or warn if it is of other bins or of another moment."""
        bins, moment = state["table"].shape[1], state["moment"]
        if bins != self.bins:
            reason = f"`bins` is {self.bins}, the checkpoint's table has {bins}"
        elif moment != self.moment:
            reason = f"`moment` is {self.moment!r}, the checkpoint's table is of {moment!r}"
        else:
            self.table, self.observed = (
                state[name].to(getattr(self, name), copy=True) for name in ("table", "observed")
            )
            return
        warn_of_dropped_state(
            f"LearnedProposal: {reason}: the table is dropped, and learning starts anew."
        )


def draw_times(u: Tensor, objective: WeightedTimes, proposal: Proposal | None) -> Times:
    """Return times at uniform numbers, with their importance weights, in float32.

    Args:
        u: Uniform numbers ``(n,)``, float64.
        objective: The loss that they are drawn for.
        proposal: Density to draw from; that of the loss if None.
    """
    if proposal is None:
        t = objective.timesteps.icdf(u).to(torch.float32)
        return Times(t, torch.ones_like(t))
    h = proposal(objective, u.device)
    v = h.icdf(u)
    t, weight = objective.timesteps.icdf(v), 1 / h(v)
    product = objective.weight(t) * weight
    return Times(*(x.to(torch.float32) for x in (t, weight, product)))


def _weights(objective: WeightedTimes, t: Tensor) -> Tensor:
    weight = objective.weight(t)
    if not bool((torch.isfinite(weight) & (weight >= 0)).all() & (weight.sum() > 0)):
        raise ValueError(
            f"The loss weight must be finite, not negative and not all zero for a proposal, got "
            f"{weight.min():.3g} to {weight.max():.3g}: use another weighting or proposal."
        )
    return weight
