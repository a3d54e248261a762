"""Candidates side by side: prepared, timed, and measured on the same batches, times and noise.

A repetition takes two batches of the training set, encoded once for all candidates that do not
change how many views there are. On these every estimator gets the same times
and the same noise, and eight ordinary backward passes at the batch size of training fill the nested
design of ``variance.components``. Estimators differ by what they do with equal draws, so that their
ratios are far more precise than the variances. The same passes are timed; encoding and the
optimizer's step, which all estimators share, are timed once and added.

Variances are of the batch gradient, times the number of samples that the current estimator has in a
batch, whatever the draws of each and the views of the candidate. They include what a batch shares:
drawn references, and strata, which couple its draws so that single ones do not show the variance.
Strata are those of one rank's batch; in training they span ranks and accumulated batches and are
finer.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_vr.auditing.candidates import Candidate
from lightning_vr.auditing.comparison import Comparison
from lightning_vr.auditing.preparation import (
    choose_resamples,
    fill_targets,
    fit_control_variates,
    learn,
    refused,
)
from lightning_vr.auditing.step_timing import TimedMeasurement
from lightning_vr.core.devices import timed
from lightning_vr.core.distributed import all_reduce_mean, rank
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator, seed_global_rng
from lightning_vr.core.types import Clean
from lightning_vr.lifecycle.precision import loss_scale
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.module import DiffusionModule


class CandidateMeasurement:
    """Measures candidates on a trainer that is fitting.

    Args:
        trainer: The trainer.
        module: Its module.

    Attributes:
        names: Names of the groups of parameters.
        gradients: Takes the gradients.
    """

    def __init__(self, trainer: Trainer, module: EstimatorModule) -> None:
        self.trainer, self.module = trainer, module
        self.loss = module.noisy_loss(trainer.precision_plugin.forward_context)
        self.names, groups = parameter_groups(module)
        self.gradients = TimedMeasurement(self.loss, self.source, groups, device=module.device)
        self.gradients.loss_scale = loss_scale(trainer)
        self._encodings = 0

    def prepare(
        self,
        candidates: list[Candidate],
        batches: Callable[[], Iterator[Any]],
        goes_on: Callable[[], bool],
        *,
        has_references: bool = False,
    ) -> dict[str, str]:
        """Bring candidates to where they would be in training; all ranks must call it.

        Args:
            candidates: Those to measure.
            batches: Starts an endless stream of batches, other ones than are measured on.
            goes_on: Asked before each further batch that proposals learn from.
            has_references: Whether targets have their references already.

        Returns:
            Names of candidates that cannot be measured, and why.
        """
        reasons = refused(self.module, candidates)

        def rest() -> list[Candidate]:
            return [c for c in candidates if c.name not in reasons]

        module, run = self.module, RunContext.of(self.trainer)
        if isinstance(module, DiffusionModule) and not has_references:
            reasons |= fill_targets(self.trainer, module, rest())
        stream = batches()
        encoded = (self.encode(batch) for batch in stream)
        reasons |= learn(self.loss, rest(), encoded, self.source, goes_on)
        reasons |= choose_resamples(self.trainer, module, rest(), stream)
        if not isinstance(module, DiffusionModule):
            return reasons
        return reasons | fit_control_variates(module, run, rest(), stream, self.encode, self.source)

    def repeat(
        self,
        comparison: Comparison,
        candidates: list[Candidate],
        pair: list[Any],
        number: int,
        shared_seconds: float = 0.0,
    ) -> None:
        """Add a repetition of each candidate; all ranks must call it.

        Args:
            comparison: What to add to.
            candidates: The current estimator and its rivals.
            pair: Two batches, as loaders give them.
            number: Number of the repetition, the key of its draws.
            shared_seconds: Seconds of a step that all estimators share.
        """
        device = self.module.device
        shared, encoding = self._encoded(pair, number)
        for candidate in candidates:
            self.gradients.reset_seconds()
            with candidate.in_place(self.module):
                own = (shared, encoding) if candidate.views is None else self._encoded(pair, number)
                clean, longer = own[0], own[1] - encoding
                components = self.gradients.by_differences(clean, "repeat", number)
            seconds = torch.tensor(self.gradients.step_seconds() + longer, device=device)
            seconds = all_reduce_mean(seconds.to(torch.float32)) + shared_seconds
            scaled = components.scaled(len(shared[0].x0) / len(clean[0].x0))
            comparison.add(candidate, scaled.over_ranks(device), float(seconds))

    def encode(self, batch: Any, *key: int | str) -> Clean:
        """Return the samples of a batch; what encoding draws is of a key, or of a new one."""
        if not key:
            self._encodings += 1
        source = self.source("encode", *(key or (self._encodings,)))
        with seed_global_rng(source), self.trainer.precision_plugin.forward_context():
            return self.module.clean(batch)

    def other_work(self, batch: Any) -> None:
        """Do the work of a step that no estimator changes."""
        with self.trainer.precision_plugin.forward_context():
            self.module.other_work(batch)

    def _encoded(self, pair: list[Any], number: int) -> tuple[list[Clean], float]:
        """Return the samples of two batches, and the seconds that one of them takes."""
        found = [
            timed(partial(self.encode, batch, "repeat", number, i), self.module.device)
            for i, batch in enumerate(pair)
        ]
        return [clean for clean, _ in found], min(seconds for _, seconds in found)

    def source(self, *key: int | str) -> torch.Generator:
        """Return the generator of this run, this rank, this step and ``key``."""
        step, device = self.trainer.global_step, self.module.device
        return generator(self.module.run_seed, rank(), "audit", step, *key, device=device)
