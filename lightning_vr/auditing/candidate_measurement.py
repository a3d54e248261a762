"""Candidates side by side: prepared, timed, and measured on the same batches, times and noise.

A repetition takes two batches of the training set. On these every estimator gets the same times
and the same noise, and eight ordinary backward passes at the batch size of training fill the nested
design of ``variance.components``. Estimators differ by what they do with equal draws, so that their
ratios are far more precise than the variances. The same passes are timed; encoding and the
optimizer's step, which all estimators share, are timed once and added.

Variances are per sample, whatever the number of draws of each. They include what a batch shares:
drawn references, and strata, which couple its draws so that single ones do not show the variance.
Strata are those of one rank's batch; in training they span ranks and accumulated batches and are
finer.
"""

from collections.abc import Callable, Iterator
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
from lightning_vr.core.distributed import all_reduce_mean, rank
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.lifecycle.precision import loss_scale
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.noisy_losses import DiffusionLoss


class CandidateMeasurement:
    """Measures candidates on a trainer that is fitting.

    Args:
        trainer: The trainer.
        module: Its module.

    Attributes:
        names: Names of the groups of parameters.
        gradients: Takes the gradients.
    """

    def __init__(self, trainer: Trainer, module: DiffusionModule) -> None:
        self.trainer, self.module = trainer, module
        self.loss = DiffusionLoss(module, trainer.precision_plugin.forward_context)
        self.names, groups = parameter_groups(module)
        self.gradients = TimedMeasurement(self.loss, self.source, groups, device=module.device)
        self.gradients.loss_scale = loss_scale(trainer)

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

        if not has_references:
            reasons |= fill_targets(self.trainer, self.module, rest())
        stream = batches()
        encoded = (self.encode(batch) for batch in stream)
        reasons |= learn(self.loss, rest(), encoded, self.source, goes_on)
        reasons |= choose_resamples(self.trainer, self.module, rest(), stream)
        run = RunContext.of(self.trainer)
        return reasons | fit_control_variates(
            self.module, run, rest(), stream, self.encode, self.source
        )

    def repeat(
        self,
        comparison: Comparison,
        candidates: list[Candidate],
        pair: list[Clean],
        number: int,
        shared_seconds: float = 0.0,
    ) -> None:
        """Add a repetition of each candidate; all ranks must call it.

        Args:
            comparison: What to add to.
            candidates: The current estimator and its rivals.
            pair: Two batches.
            number: Number of the repetition, the key of its draws.
            shared_seconds: Seconds of a step that all estimators share.
        """
        device = self.module.device
        for candidate in candidates:
            self.gradients.reset_seconds()
            with candidate.in_place(self.module):
                components = self.gradients.by_differences(pair, "repeat", number)
            seconds = all_reduce_mean(torch.tensor(self.gradients.step_seconds(), device=device))
            comparison.add(
                candidate, components.over_ranks(device), float(seconds) + shared_seconds
            )

    def encode(self, batch: Any) -> Clean:
        """Return the samples of a batch."""
        with self.trainer.precision_plugin.forward_context():
            return self.module.clean(batch)

    def source(self, *key: int | str) -> torch.Generator:
        """Return the generator of this run, this rank, this step and ``key``."""
        step, device = self.trainer.global_step, self.module.device
        return generator(self.module.run_seed, rank(), "audit", step, *key, device=device)
