"""Seconds of a training step: encoding, draws, forward, backward and optimizer, all timed in turn.

Loading of data is left out: it is hidden behind the step where workers keep up.
"""

import statistics
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_vr.auditing.candidates import Candidate
from lightning_vr.module import DiffusionModule
from lightning_vr.types import Clean
from lightning_vr.variance.accounting import CostModel
from lightning_vr.variance.gradients import GradientMeasurement

_ROUNDS = 15


class StepTimer:
    """Times the steps of candidates, and of parts of a batch.

    Args:
        trainer: A trainer that is about to train.
        module: Its module.
        measurement: Takes the gradients.
    """

    def __init__(
        self, trainer: Trainer, module: DiffusionModule, measurement: GradientMeasurement
    ) -> None:
        self.trainer, self.module, self.measurement = trainer, module, measurement

    def measure(
        self,
        candidates: list[Candidate],
        clean: Clean,
        encode: Callable[[], Any],
        goes_on: Callable[[], bool],
    ) -> tuple[dict[str, Tensor], CostModel]:
        """Return the seconds of each candidate's steps, in turns, and a model of the current one's.

        Args:
            candidates: What to time, the current estimator first.
            clean: An encoded batch.
            encode: Encodes it.
            goes_on: Asked before each round, the first two excepted.
        """
        whole = len(clean.x0)
        parts = sorted({max(1, whole // k) for k in (1, 2, 4)})
        times: dict[Hashable, list[float]] = {}

        def add(name: Hashable, function: Callable[[], Any]) -> None:
            self._synchronize()
            start = time.perf_counter()
            function()
            self._synchronize()
            times.setdefault(name, []).append(time.perf_counter() - start)

        for i in range(_ROUNDS + 1):
            if i > 1 and not goes_on():
                break
            for candidate in candidates:
                with candidate.in_place(self.module):
                    add(candidate.name, partial(self._step, clean))
            for rows in parts:
                add(rows, partial(self._step, clean.rows(slice(0, rows))))
            add("encode", encode)
            self._time_optimizer(add)

        # the first round warms up
        median = {name: statistics.median(found[1:]) for name, found in times.items()}
        model = _cost_model(median, parts)
        added = median["encode"] + median["optimizer"]
        rounds = {
            candidate.name: torch.tensor(times[candidate.name][1:]) for candidate in candidates
        }
        return {name: seconds + added for name, seconds in rounds.items()}, model

    def _step(self, clean: Clean) -> list[Tensor]:
        loss, source = self.measurement.loss, self.measurement.source
        with torch.no_grad():
            times = loss.times(clean, source("timing", "times"), 0.0, 1.0)
            rows = loss.draw(clean, times, source("timing", "noise"))
        return self.measurement.gradient(rows, "timing")

    def _time_optimizer(self, add: Callable[[Hashable, Callable[[], Any]], None]) -> None:
        """Time a step on gradients of zero, and put the weights back."""
        optimizer = self.trainer.optimizers[0]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        add("optimizer", optimizer.step)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None

    def _synchronize(self) -> None:
        if self.module.device.type == "cuda":
            torch.cuda.synchronize(self.module.device)


def _cost_model(median: dict[Hashable, float], parts: list[int]) -> CostModel:
    """Fit a model to the seconds of passes over so many rows, of encoding and of the optimizer."""
    whole, fixed = parts[-1], median["optimizer"]
    encoding = median["encode"] / whole
    if whole < 4:
        return CostModel(fixed, encoding, median[whole] / whole)
    # a pass takes as long however its rows are made up of samples and resamples of them
    shapes = [(rows // k, k) for rows in parts for k in (1, 2) if rows % k == 0]
    return CostModel.fit(
        [samples for samples, _ in shapes],
        [resamples for _, resamples in shapes],
        [median[r * k] + encoding * r + fixed for r, k in shapes],
    )
