"""How many resamples of each sample pay: the pilot of ``CARV(resamples="auto")``.

With variance V_B between samples and V_W within one, and seconds ``upstream`` to encode a sample
and ``denoise`` to train on one draw of it, variance times cost is least at ``K² = V_W upstream /
(V_B denoise)`` (``variance.accounting``). No K gains more than ``1 + upstream / denoise``, so the
pilot ends after a few timed passes where ``encode`` is cheap. Elsewhere a nested design at the
present weights measures V_B and V_W with the draws of training, strata included; the fixed cost of
a pass counts as upstream, since the number of samples is given. K depends on earlier draws alone,
so that the estimate stays unbiased.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_vr.core.devices import timed
from lightning_vr.core.distributed import all_reduce_mean, broadcast, least
from lightning_vr.core.rng import preserve_global_rng, seed_global_rng
from lightning_vr.core.rows import concatenated, leaves, mapped, tensors
from lightning_vr.core.types import Clean
from lightning_vr.estimators.carv import CARV
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.process.objective import Objective
from lightning_vr.training.noisy_losses import Precision
from lightning_vr.variance.accounting import (
    CostModel,
    best_resamples,
    fixed_and_marginal,
    variance_times_cost,
)
from lightning_vr.variance.gradient_measurement import GradientMeasurement, NoisyLoss

_LEAST_GAIN = 1.05
"""Predicted gain below which K stays as it is."""

_PILOT_RESAMPLES = 4
_PILOT_UNITS = 8
_PILOT_SAMPLES = 32

_MEMORY = 0.5
"""Weight of all earlier pilots against a new one."""


class SampledModel(Protocol):
    """What a pilot knows of a model that trains."""

    @property
    def objective(self) -> Objective:
        """The loss as an expectation."""

    def clean(self, batch: Any) -> Clean:
        """Encode a batch."""

    def generator(self, *key: int | str) -> torch.Generator:
        """Return the generator of this run, this rank and a key."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all parameters."""


class ResamplesPilot:
    """Chooses K while a model trains.

    Args:
        model: A model that is training with ``CARV(resamples="auto")``.
        draws: Its draws.
        run: The run that it trains in.
        loss: Makes the model's loss, whose draws can be drawn again, from the run's precision.

    Attributes:
        failures: Number of times in a row that gradients were not finite.
    """

    def __init__(
        self,
        model: SampledModel,
        draws: CARV,
        run: RunContext,
        loss: Callable[[Precision], NoisyLoss],
    ) -> None:
        self.model, self.draws, self.run = model, draws, run
        self._make_loss = loss
        self._batches: list[Any] = []
        self.failures = self._not_before = 0

    def before_step(self, batch: Any) -> None:
        """Choose anew if it is time; all ranks must call it before each optimizer step."""
        step, pilot = self.run.step(), self.draws.pilot
        if pilot is not None and step - pilot["step"] < self.draws.pilot_every_n_steps:
            return
        if step < self._not_before:
            return
        with preserve_global_rng(), seed_global_rng(self._source("global")):
            found = self._measure(step, batch)
        if found is None:
            return
        self._batches = []
        between, within, encode, cost = found
        if not math.isfinite(between + within):
            # float16 until its loss scale is found: soon again, and less and less often
            rank_zero_info(f"CARV at step {step}: gradients are not finite and are left out.")
            self._not_before = step + 2**self.failures
            self.failures += 1
            return
        self.failures = 0
        if pilot is not None and "between" in pilot:
            between = _MEMORY * pilot["between"] + (1 - _MEMORY) * between
            within = _MEMORY * pilot["within"] + (1 - _MEMORY) * within
        best = self._best(between, within, cost)
        reason = (
            f"and the variance within a sample is {within / max(between, 1e-30):.3g} times that "
            f"between samples; predicted ECM over one draw "
            f"{_gain(between, within, cost, best, over=1):.2f}"
        )
        self._apply_resamples(step, best, encode / cost.denoise, reason)
        assert self.draws.pilot is not None
        self.draws.pilot |= {"between": between, "within": within}

    def _measure(self, step: int, batch: Any) -> tuple[float, float, float, CostModel] | None:
        """Return V_B, V_W, seconds to encode a sample and the cost of a step.

        Returns None if no number of resamples could gain, or until there are enough samples.
        """
        clean = self.model.clean(batch)
        encode, denoise = self._mean_over_ranks(*self._seconds(batch, clean))
        # no K gains more than this factor, except where a larger batch would gain it too
        if 1 + encode / denoise <= _LEAST_GAIN:
            reason = "so that no number of resamples could gain 5 %"
            self._apply_resamples(step, self.draws.least_resamples, encode / denoise, reason)
            return None
        self._batches.append(batch)
        samples = least(len(self._batches) * len(clean.x0))
        if samples < _PILOT_UNITS * self._rows:
            return None
        fixed, marginal = self._mean_over_ranks(*self._pass_seconds(clean))
        cost = CostModel(0.0, encode + fixed / len(clean.x0), marginal or denoise)
        between, within = self._mean_over_ranks(*self._components())
        return between, within, encode, cost

    def _best(self, between: float, within: float, cost: CostModel) -> int:
        """Return the K of least variance times cost, unless the present K is nearly as good."""
        group = self.draws.least_resamples
        pairs = CostModel(0.0, cost.upstream, group * cost.denoise)
        largest = self.draws.max_resamples // group
        best = group * best_resamples(between, within / group, pairs, largest=largest)
        gain = _gain(between, within, cost, best, over=self.draws.chosen)
        return best if gain > _LEAST_GAIN else self.draws.chosen

    def _apply_resamples(self, step: int, resamples: int, ratio: float, reason: str) -> None:
        """Take rank 0's K, and report why."""
        decision = broadcast(torch.tensor(resamples, device=self._device))
        before, self.draws.chosen = self.draws.chosen, int(decision)
        self.draws.pilot = {"step": step}
        rank_zero_info(
            f"CARV: K = {self.draws.chosen} draws of each sample from step {step} on "
            f"({before} before): `encode` takes {ratio:.3g} times as long as a draw of the "
            f"denoiser, {reason}."
        )

    def _seconds(self, batch: Any, clean: Clean) -> tuple[float, float]:
        """Return seconds to encode a sample, and to train on one draw of it at the present K."""
        count = len(clean.x0)
        encode, denoise = self._medians(lambda: self._upstream(batch), self._pass(clean))
        return encode / count, denoise / (count * self.draws.chosen)

    def _pass_seconds(self, clean: Clean) -> tuple[float, float]:
        """Return the fixed seconds of a pass, and the seconds of one more draw."""
        few, many = self.draws.least_resamples, self._pilot_resamples
        if few == many:
            return 0.0, 0.0
        with self._taking(few):
            smaller = self._pass(clean)
        with self._taking(many):
            larger = self._pass(clean)
        size = len(clean.x0)
        return fixed_and_marginal(few * size, many * size, *self._medians(smaller, larger))

    def _pass(self, clean: Clean) -> Callable[[], Any]:
        """Return a function that takes the gradient of a batch's draws, not of its upstream."""
        measurement = self._measurement()
        own = mapped(tensors(clean), lambda x: x.detach().requires_grad_(x.requires_grad))
        clean = Clean(**own)
        source = self._source("timing")
        times = self.draws.times(clean, self.model.objective, source)
        rows = measurement.loss.draw(clean, times, source)
        return lambda: measurement.gradient(rows, "timing")

    def _medians(self, *functions: Callable[[], Any], rounds: int = 3) -> list[float]:
        """Return the median seconds of calls in turn, after one of each to warm up."""
        found = [[timed(f, self._device)[1] for f in functions] for _ in range(rounds + 1)]
        return [statistics.median(times) for times in zip(*found[1:], strict=True)]

    def _components(self) -> tuple[float, float]:
        """Return V_B and V_W, both of one sample's gradient."""
        parts = [tensors(self.model.clean(batch)) for batch in self._batches]
        clean = Clean(**concatenated(parts))
        size = min(len(clean.x0), _PILOT_SAMPLES) // (_PILOT_UNITS * self._rows) * self._rows
        units = [clean.rows(slice(i * size, (i + 1) * size)) for i in range(_PILOT_UNITS)]
        # sums of squares need full precision; the passes enter that of the trainer again
        precise = torch.autocast(self._device.type, enabled=False)
        with self._taking(self._pilot_resamples), precise:
            found = self._measurement().by_differences(units, "pilot")
        within = float((found.timestep + found.noise)[0]) * self._pilot_resamples
        return float(found.data[0]), within

    @property
    def _pilot_resamples(self) -> int:
        least, largest = self.draws.least_resamples, self.draws.max_resamples
        return max(self.draws.chosen, min(_PILOT_RESAMPLES, largest // least * least))

    @contextmanager
    def _taking(self, resamples: int) -> Iterator[None]:
        """Take ``resamples`` draws of each sample, for a while."""
        chosen, self.draws.chosen = self.draws.chosen, resamples
        try:
            yield
        finally:
            self.draws.chosen = chosen

    def _measurement(self) -> GradientMeasurement:
        loss = self._make_loss(self.run.precision)
        groups = [0 for p in self.model.parameters() if p.requires_grad]
        measurement = GradientMeasurement(loss, self._source, groups)
        measurement.loss_scale = self.run.loss_scale()
        return measurement

    @property
    def _rows(self) -> int:
        """Consecutive samples of a batch that depend on each other, such as pairs of views."""
        return 1

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _source(self, *key: int | str) -> torch.Generator:
        return self.model.generator("resamples", self.run.step(), *key)

    def _upstream(self, batch: Any) -> None:
        """Run the upstream as training does: forward, and backward if it is trained."""
        clean = self.model.clean(batch)
        self._backward([clean.x0, *leaves(clean.cond or {})])

    def _backward(self, outputs: list[torch.Tensor]) -> None:
        """Differentiate those of the upstream's outputs that have a graph."""
        outputs = [x for x in outputs if x.requires_grad]
        if outputs:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            if any(isinstance(p, DTensor) for p in parameters):
                raise ValueError(
                    "`resamples` must be a number where `encode` is trained and weights are "
                    "sharded, got 'auto': set it, or train with 'ddp'."
                )
            cotangents = [torch.ones_like(x) for x in outputs]
            torch.autograd.grad(outputs, parameters, cotangents, allow_unused=True)

    def _mean_over_ranks(self, *values: float) -> list[float]:
        device = self._device
        mean = all_reduce_mean(torch.tensor(values, dtype=torch.float32, device=device))
        found: list[float] = mean.tolist()
        return found


def _gain(between: float, within: float, cost: CostModel, resamples: int, over: int) -> float:
    """Return the ECM of K draws over another number."""
    own, other = (
        variance_times_cost(max(between, 0.0), max(within, 0.0), cost, k) for k in (resamples, over)
    )
    return other / own if own > 0 else 1.0
