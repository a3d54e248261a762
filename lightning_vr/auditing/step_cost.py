"""What a training step costs, as far as timings resolve it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vr.variance.accounting import CostModel
from lightning_vr.variance.intervals import Interval, jackknife


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step of R samples with K draws, ``fixed + upstream R + denoise R K``, with 95 %.

    An interval of ``denoise`` that reaches 0 says that passes of the sizes that were timed take
    equally long within error.

    Attributes:
        fixed: For each step, whatever its size.
        upstream: For each sample: encoding, and the pass back through it if it is trained.
        denoise: For each noised sample: forward and backward through the network.
    """

    fixed: Interval
    upstream: Interval
    denoise: Interval

    @property
    def model(self) -> CostModel:
        """The estimates, those below 0 as 0."""
        intervals = (self.fixed, self.upstream, self.denoise)
        return CostModel(*(max(0.0, each.estimate) for each in intervals))

    def range(self) -> tuple[CostModel, CostModel, CostModel]:
        """Return the costs at which fewest resamples pay, the estimates, and those of the most."""
        present = self.model
        least = CostModel(present.fixed, max(0.0, self.upstream.low), self.denoise.high)
        most = CostModel(present.fixed, self.upstream.high, max(0.0, self.denoise.low))
        return least, present, most


def step_cost(
    passes: dict[int, Tensor],
    encode: Tensor,
    optimizer: Tensor,
    samples: int,
    *,
    through_upstream: bool = False,
) -> StepCost:
    """Return the costs of a step from the seconds of its parts in the same rounds.

    Args:
        passes: Seconds of forward and backward ``(n,)`` by number of draws, of two sizes. With one
            size alone all of them count as ``denoise``, with an interval that reaches 0.
        encode: Seconds to encode the whole batch ``(n,)``.
        optimizer: Seconds of the optimizer's step ``(n,)``.
        samples: Samples of the whole batch.
        through_upstream: Whether passes go back through the upstream, all of them from the whole
            batch: what they take whatever the draws then counts as ``upstream``.
    """
    few, many = min(passes), max(passes)

    def mean(values: Tensor) -> Interval:
        return jackknife(lambda of: of, values)

    if few == many:
        denoise = mean(passes[many] / many)
        least = Interval(denoise.estimate, 0.0, denoise.high)
        return StepCost(mean(optimizer), mean(encode / samples), least)
    slope = ((passes[many] - passes[few]) / (many - few)).to(torch.float64)
    constant = passes[many] - many * slope
    if through_upstream:
        return StepCost(mean(optimizer), mean((encode + constant) / samples), mean(slope))
    return StepCost(mean(constant + optimizer), mean(encode / samples), mean(slope))
