"""Seconds of a training step: encoding, draws, forward, backward and optimizer.

Passes are timed where their gradients are measured. So all passes of an audit count, in turns of
the candidates over its whole duration, and other work of the machine affects all candidates alike.
Loading of data is left out: it is hidden behind the step where workers keep up.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_vr.auditing.candidates import Candidate
from lightning_vr.auditing.step_cost import StepCost, step_cost
from lightning_vr.core.devices import timed
from lightning_vr.core.distributed import all_reduce_mean
from lightning_vr.core.gradients import is_trained
from lightning_vr.core.rows import Rows
from lightning_vr.core.types import Clean
from lightning_vr.estimators.carv import CARV
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.variance.components import DRAWS_PER_UNIT
from lightning_vr.variance.gradient_measurement import GradientMeasurement

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 15

_MANY_DRAWS = 16
"""Draws of each sample in the larger of two timed passes through an upstream, unless it has more.
"""


class TimedMeasurement(GradientMeasurement):
    """Measures gradients, and the seconds that each takes."""

    def __init__(self, *args: Any, device: torch.device, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.device = device
        self._draw_seconds: list[float] = []
        self._pass_seconds: list[float] = []

    def gradient(self, rows: Rows, *key: int | str) -> list[Tensor]:
        """Return the gradient of the mean loss of rows, and record its seconds."""
        found, seconds = timed(partial(super().gradient, rows, *key), self.device)
        self._pass_seconds.append(seconds)
        return found

    def reset_seconds(self) -> None:
        """Delete all recorded seconds."""
        self._pass_seconds, self._draw_seconds = [], []

    def step_seconds(self) -> float:
        """Return the smallest seconds of draws, forward and backward since the last reset.

        All passes do the same work: if one takes longer, other work of the machine is the cause.
        """
        return min(self._pass_seconds) + min(self._draw_seconds)

    def _draws(
        self, clean: Clean, key: tuple[int | str, ...], low: float, high: float
    ) -> list[Rows]:
        found, seconds = timed(partial(super()._draws, clean, key, low, high), self.device)
        self._draw_seconds.append(seconds / DRAWS_PER_UNIT)
        return found


class StepTimer:
    """Times what candidates share, and passes over parts of a batch.

    Args:
        trainer: A trainer that is about to train.
        module: Its module.
        measurement: Takes the gradients.
    """

    def __init__(
        self, trainer: Trainer, module: EstimatorModule, measurement: GradientMeasurement
    ) -> None:
        self.trainer, self.module, self.measurement = trainer, module, measurement

    def warm_up(self, candidates: list[Candidate], clean: Clean) -> None:
        """Take a step with each candidate: the first one is slow."""
        for candidate in candidates:
            with candidate.in_place(self.module):
                self._step(clean)

    def measure(
        self,
        clean: Clean,
        encode: Callable[[], Any],
        other: Callable[[], Any],
        goes_on: Callable[[], bool],
    ) -> tuple[float, StepCost]:
        """Return the seconds that all candidates share, and the cost of the current step.

        Both are means over ranks, which all must call it.

        Args:
            clean: An encoded batch.
            encode: Encodes it.
            other: Does what else belongs to a step, whatever its estimator.
            goes_on: Asked before each round once there are a few.
        """
        passes = self._passes(clean)
        names: list[int | str] = [*passes, "encode", "optimizer"]
        times: dict[int | str, list[float]] = {name: [] for name in names}
        for i in range(_MOST_ROUNDS + 1):
            if i > _LEAST_ROUNDS and not goes_on():
                break
            for draws, step in passes.items():
                times[draws].append(timed(step, self.module.device)[1])
            times["encode"].append(timed(encode, self.module.device)[1])
        # afterwards: the graph of an upstream that is trained ends with a step
        for _ in times["encode"]:
            others = timed(other, self.module.device)[1]
            times["optimizer"].append(self._time_optimizer() + others)

        # the first round warms up; ranks that saw other times would choose other finalists
        found = {name: self._over_ranks(seconds[1:]) for name, seconds in times.items()}
        shared = float(found["encode"].median() + found["optimizer"].median())
        seconds = {draws: found[draws] for draws in passes}
        parts = found["encode"], found["optimizer"]
        is_through = is_trained(clean)
        return shared, step_cost(seconds, *parts, len(clean.x0), through_upstream=is_through)

    def _over_ranks(self, seconds: list[float]) -> Tensor:
        own = torch.tensor(seconds, dtype=torch.float32, device=self.module.device)
        found: Tensor = all_reduce_mean(own).cpu().double()
        return found

    def _passes(self, clean: Clean) -> dict[int, Callable[[], Any]]:
        """Return passes of two sizes by their number of draws: of fewer samples, or of more draws.

        A pass through an upstream that is trained takes as long for fewer of its samples.
        """
        whole, resamples = len(clean.x0), self.module.draws.draws_per_sample
        if is_trained(clean):
            chunk = getattr(self.module.draws, "chunk_size", None)
            return {
                k * whole: partial(self._step_of, CARV(k, scope="none", chunk_size=chunk), clean)
                for k in (1, max(_MANY_DRAWS, resamples))
            }
        parts = sorted({max(1, whole // 4), whole})
        return {n * resamples: partial(self._step, clean.rows(slice(0, n))) for n in parts}

    def _step_of(self, draws: CARV, clean: Clean) -> list[Tensor]:
        with Candidate("timing", draws=draws).in_place(self.module):
            return self._step(clean)

    def _step(self, clean: Clean) -> list[Tensor]:
        loss, source = self.measurement.loss, self.measurement.source
        times = loss.times(clean, source("timing", "times"), 0.0, 1.0)
        rows = loss.draw(clean, times, source("timing", "noise"))
        return self.measurement.gradient(rows, "timing")

    def _time_optimizer(self) -> float:
        """Return the seconds of a step on gradients of zero, and restore the weights."""
        optimizer = self.trainer.optimizers[0]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        try:
            _, seconds = timed(optimizer.step, self.module.device)
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                    parameter.grad = None
        return seconds
