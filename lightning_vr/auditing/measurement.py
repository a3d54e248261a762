"""The measurement itself: candidates side by side on one trainer, within a budget of seconds.

Each repetition takes two batches of the training set. On these every estimator gets the same times
and the same noise, and eight ordinary backward passes at the batch size of training fill the nested
design of ``variance.components``. Estimators differ by what they do with equal draws, so that their
ratios are far more precise than the variances. Intervals come from a bootstrap over repetitions.
The same passes are timed; encoding and the optimizer's step, which all estimators share, are timed
once and added.

Variances are per sample, whatever the number of draws of each. They include what a batch shares:
drawn references, and strata, which couple its draws so that single ones do not show the variance.
Strata are those of one rank's batch; in training they span ranks and accumulated batches and are
finer.

The clock decides how many repetitions there are, and nothing else: which candidates are measured in
all of them depends on their variance and their number of draws.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from tqdm.auto import tqdm

from lightning_vr.auditing.batch_pairs import batch_pairs
from lightning_vr.auditing.candidates import Candidate
from lightning_vr.auditing.comparison import CURRENT, Comparison
from lightning_vr.auditing.default_candidates import default_candidates
from lightning_vr.auditing.preparation import (
    choose_resamples,
    fill_targets,
    fit_control_variates,
    learn,
    least_draws,
    refused,
    with_own_state,
)
from lightning_vr.auditing.result import Audit
from lightning_vr.auditing.step_timing import StepTimer, TimedMeasurement
from lightning_vr.core.distributed import all_reduce_mean, broadcast, rank, world_size
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.lifecycle.precision import loss_scale, loss_scaler
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.lifecycle.stopping import raise_if_asked
from lightning_vr.lifecycle.training_set import training_loader
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.accounting import (
    CostModel,
)
from lightning_vr.variance.gradient_statistics import GradientStatistics
from lightning_vr.variance.nested_measurement import NestedMeasurement

_LEVELS = 8
_LEVEL_SAMPLES = 32
_LEVEL_BUDGET = 0.2
"""Fraction of the budget for the bins of the noise level."""

_TIMING_BUDGET = 0.05
_LEARNING_BUDGET = 0.05
_LEAST_REPETITIONS = 3


class AuditMeasurement:
    """One audit on a trainer that is about to train.

    Args:
        trainer: The trainer.
        module: The module to audit.
        candidates: What to compare with, or None for the default candidates.
        budget: Seconds to spend.
        progress: Whether to show a progress bar.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: DiffusionModule,
        candidates: list[Candidate] | None,
        budget: float,
        progress: bool,
    ) -> None:
        self.trainer, self.module = trainer, module
        self.start, self.budget = time.perf_counter(), budget
        self.loader = training_loader(trainer)
        size = len(self.loader.dataset)  # type: ignore[arg-type]
        rivals = default_candidates(module, size) if candidates is None else candidates
        self.candidates = [Candidate(CURRENT), *with_own_state(rivals)]
        self.skipped: dict[str, str] = {}
        self._leave_out(refused(module, self.candidates[1:]))
        self._leave_out(fill_targets(trainer, module, self.candidates))
        self.loss = DiffusionLoss(module, trainer.precision_plugin.forward_context)
        self.names, groups = parameter_groups(module)
        self.measurement = TimedMeasurement(self.loss, self._source, groups, device=module.device)
        self.batches = batch_pairs(trainer, self.loader)
        # last, since an error would share its line with a visible bar
        self.bar = _bar(budget, is_shown=progress and trainer.is_global_zero)
        self.batch = 0
        # of what all estimators need for a step
        self.shared_seconds = 0.0
        self.comparison = Comparison(module)

    def measure(self) -> Audit:
        """Run the audit; all ranks must call it."""
        with self.bar:
            self.bar.set_description("Audit: proposals")
            self._prepare()
            self.bar.set_description("Audit: timing")
            cost = self._time()
            self.bar.set_description("Audit: noise levels")
            statistics = GradientStatistics(self.names, self.module.objective.noise_levels(_LEVELS))
            self._measure_levels(statistics)
            self.bar.set_description("Audit: candidates")
            self._repeat()
        for components in self.comparison.present:
            statistics.add(components)
        return Audit(
            [self.comparison.estimator(candidate) for candidate in self.candidates],
            statistics,
            batch=self.batch * world_size(),
            cost=cost,
            repetitions=len(self.comparison.present) * world_size(),
            seconds=time.perf_counter() - self.start,
            skipped=self.skipped,
            least_draws=least_draws(self.module.draws),
        )

    def _leave_out(self, reasons: dict[str, str]) -> None:
        self.skipped |= reasons
        self.candidates = [c for c in self.candidates if c.name not in reasons]

    def _prepare(self) -> None:
        """Let draws learn and choose K, and fit control variates, on separate batches."""
        start = self._progress()
        self._find_loss_scale()
        reasons = learn(
            self.loss,
            self.candidates,
            (self._encode(batch) for batch in self._single_batches()),
            self._source,
            goes_on=lambda: self._rank_zero_decides(self._progress() < start + _LEARNING_BUDGET),
        )
        self._leave_out(reasons)
        batches = self._single_batches()
        self._leave_out(choose_resamples(self.trainer, self.module, self.candidates, batches))
        self._leave_out(
            fit_control_variates(
                self.module,
                RunContext.of(self.trainer),
                self.candidates,
                batches,
                self._encode,
                self._source,
            )
        )

    def _find_loss_scale(self) -> None:
        """Lower the scale of losses until gradients are finite, as training in float16 begins."""
        scaler = loss_scaler(self.trainer)
        self.measurement.loss_scale = loss_scale(self.trainer)
        if scaler is None:
            return
        scaler.scale(torch.zeros(1, device=self.module.device))  # creates the scale to change
        pair = [self._encode(batch) for batch in next(self.batches)]
        while self.measurement.loss_scale > 1:
            found = self.measurement.by_differences(pair, "loss scale")
            if bool(torch.isfinite(found.over_ranks(self.module.device).total).all()):
                return
            # by more than training does: other candidates may have larger gradients
            scaler.update(max(1.0, self.measurement.loss_scale / 16))
            self.measurement.loss_scale = loss_scale(self.trainer)

    def _single_batches(self) -> Iterator[Any]:
        while True:
            yield from next(self.batches)

    def _encode(self, batch: Any) -> Clean:
        raise_if_asked(self.trainer)
        with self.trainer.precision_plugin.forward_context():
            return self.module.clean(batch)

    def _source(self, *key: int | str) -> torch.Generator:
        device = self.module.device
        return generator(self.module.run_seed, rank(), "audit", *key, device=device)

    def _time(self) -> CostModel:
        """Time what steps share, and how the current one depends on the size of the batch."""
        start = self._progress()
        batch, _ = next(self.batches)
        clean = self._encode(batch)
        self.batch = len(clean.x0)
        timer = StepTimer(self.trainer, self.module, self.measurement)
        timer.warm_up(self.candidates, clean)
        self.shared_seconds, cost = timer.measure(
            clean,
            encode=lambda: self._encode(batch),
            goes_on=lambda: self._rank_zero_decides(self._progress() < start + _TIMING_BUDGET),
        )
        return cost

    def _measure_levels(self, found: GradientStatistics) -> None:
        """Measure the current estimator in bins of the noise level."""
        until, number, device = self._progress() + _LEVEL_BUDGET, 0, self.module.device
        pair = [self._encode(batch) for batch in next(self.batches)]
        nested = NestedMeasurement(self.measurement, pair[0], device, samples=2 * _LEVELS)
        while self._rank_zero_decides(number == 0 or self._progress() < until):
            if number and number % _LEVELS == 0:
                pair = [self._encode(batch) for batch in next(self.batches)]
            batches = pair
            if nested.is_per_sample:
                batches = [pair[0].rows(slice(0, _LEVEL_SAMPLES))]
            levels = nested.levels(batches, _LEVELS, number, "level", number)
            number += len(levels)
            for level, components in levels.items():
                found.add_level(level, components.over_ranks(device))

    def _repeat(self) -> None:
        """Measure every candidate on the same draws until the budget is spent."""
        open_, number, longest = self.candidates, 0, 0.0
        while self._rank_zero_decides(
            number < _LEAST_REPETITIONS or self._progress() + longest < 1
        ):
            start = self._progress()
            pair = [self._encode(batch) for batch in next(self.batches)]
            for candidate in open_:
                self._measure(candidate, pair, number)
            number, longest = number + 1, max(longest, self._progress() - start)
            if number == _LEAST_REPETITIONS:
                open_ = [c for c in open_ if not self.comparison.has_lost(c)]
                longest *= self.comparison.relative_seconds(open_)

    def _measure(self, candidate: Candidate, pair: list[Clean], number: int) -> None:
        self.measurement.reset_seconds()
        with candidate.in_place(self.module):
            components = self.measurement.by_differences(pair, "repeat", number)
        seconds = torch.tensor(self.measurement.step_seconds(), device=self.module.device)
        self.comparison.add(
            candidate,
            components.over_ranks(self.module.device),
            all_reduce_mean(seconds).cpu() + self.shared_seconds,
        )

    def _rank_zero_decides(self, decision: bool) -> bool:
        self.module.stop_if_asked()
        return bool(broadcast(torch.tensor(decision, device=self.module.device)))

    def _progress(self) -> float:
        """Show and return the fraction of the budget that is spent."""
        elapsed = time.perf_counter() - self.start
        self.bar.update(min(self.bar.total, int(elapsed)) - self.bar.n)
        return elapsed / self.budget


def _bar(budget: float, is_shown: bool) -> "tqdm[Any]":
    return tqdm(
        total=round(budget),
        desc="Audit",
        bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s",
        disable=not is_shown,
    )
