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
        upstream: For each sample: encoding.
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
    passes: dict[int, Tensor], encode: Tensor, optimizer: Tensor, resamples: int = 1
) -> StepCost:
    """Return the costs of a step from the seconds of its parts in the same rounds.

    Args:
        passes: Seconds of forward and backward ``(n,)`` by number of samples: the whole batch, and
            a part of it. With the whole batch alone all of them count as ``denoise``, with an
            interval that reaches 0.
        encode: Seconds to encode the whole batch ``(n,)``.
        optimizer: Seconds of the optimizer's step ``(n,)``.
        resamples: Draws of each sample in ``passes``.
    """
    few, many = min(passes), max(passes)

    def mean(values: Tensor) -> Interval:
        return jackknife(lambda of: of, values)

    upstream = mean(encode / many)
    if few == many:
        denoise = mean(passes[many] / (many * resamples))
        return StepCost(mean(optimizer), upstream, Interval(denoise.estimate, 0.0, denoise.high))
    slope = (passes[many] - passes[few]) / ((many - few) * resamples)
    fixed = mean(passes[many] - many * resamples * slope + optimizer)
    return StepCost(fixed, upstream, mean(slope.to(torch.float64)))
