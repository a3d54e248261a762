"""The measurement itself: candidates side by side on one trainer, within a budget of seconds.

Each repetition takes two batches of the training set. On these every estimator gets the same times
and the same noise, and eight ordinary backward passes at the batch size of training fill the nested
design of ``variance.components``; what an estimator shares within a batch is part of its variance.
Estimators differ by what they do with equal draws, so that their ratios are far more precise than
the variances; intervals come from a bootstrap over repetitions. The same passes are timed; encoding
and the optimizer's step, which all share, are timed once and added.

Variances are per sample, whatever the number of draws of each. What a batch shares is in them:
drawn references, and strata, which couple its draws so that single ones do not tell the variance.
Strata are those of one rank's batch; in training they span ranks and accumulated batches and are
finer.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from tqdm.auto import tqdm

from lightning_vr.auditing.batch_pairs import batch_pairs
from lightning_vr.auditing.candidates import Candidate, settings
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
from lightning_vr.auditing.result import Audit, MeasuredEstimator
from lightning_vr.auditing.step_timing import StepTimer, TimedMeasurement
from lightning_vr.core.distributed import all_reduce_mean, broadcast, least, rank, world_size
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.estimators.slot import SLOTS
from lightning_vr.lifecycle.configuration import UndescribableError
from lightning_vr.lifecycle.precision import loss_scale, loss_scaler
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.lifecycle.training_set import training_loader
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.accounting import (
    CostModel,
    effective_compute_multiplier,
    relative_efficiency,
)
from lightning_vr.variance.bootstrap import Interval
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_statistics import GradientStatistics
from lightning_vr.variance.moments import Moments

_OWN = "current"

_LEVELS = 8
_LEVEL_SAMPLES = 32
_LEVEL_SHARE = 0.2
"""Share of the budget for the bins of the noise level."""

_TIMING_SHARE = 0.05
_LEARNING_SHARE = 0.05
_LEAST_REPETITIONS = 3

_LOST = 0.8
"""Upper end of the ECM below which more repetitions would only confirm that a candidate loses."""


class Measuring:
    """One audit on a trainer that is about to train."""

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
        self.candidates = [Candidate(_OWN), *with_own_state(rivals)]
        self.skipped: dict[str, str] = {}
        self._leave_out(refused(module, self.candidates[1:]))
        self._leave_out(fill_targets(trainer, module, self.candidates))
        self.loss = DiffusionLoss(module, trainer.precision_plugin.forward_context)
        self.names, groups = parameter_groups(module)
        self.measurement = TimedMeasurement(self.loss, self._source, groups, device=module.device)
        self.batches = batch_pairs(trainer, self.loader)
        # last, as a bar that is shown would share its line with an error
        self.bar = _bar(budget, is_shown=progress and trainer.is_global_zero)
        self.batch = 0
        # seconds of what all steps share
        self.shared = 0.0
        self.found: dict[str, list[Components]] = {c.name: [] for c in self.candidates}
        self.seconds: dict[str, list[Tensor]] = {c.name: [] for c in self.candidates}

    def measure(self) -> Audit:
        with self.bar:
            self.bar.set_description("Audit: proposals")
            self._prepare()
            self.bar.set_description("Audit: timing")
            cost = self._time()
            self.bar.set_description("Audit: noise levels")
            statistics = GradientStatistics(self.names, self._noise_levels())
            self._measure_levels(statistics)
            self.bar.set_description("Audit: candidates")
            self._repeat()
        for components in self.found[_OWN]:
            statistics.add(components)
        estimators = [self._compare(candidate) for candidate in self.candidates]
        return Audit(
            estimators,
            statistics,
            batch=self.batch * world_size(),
            cost=cost,
            repetitions=len(self.found[_OWN]) * world_size(),
            seconds=time.perf_counter() - self.start,
            skipped=self.skipped,
            least_draws=least_draws(self.module.draws),
        )

    def _leave_out(self, reasons: dict[str, str]) -> None:
        self.skipped |= reasons
        self.candidates = [c for c in self.candidates if c.name not in reasons]

    def _prepare(self) -> None:
        """Let draws learn and choose K, and fit control variates, on batches of their own."""
        start = self._progress()
        self._find_loss_scale()
        reasons = learn(
            self.loss,
            self.candidates,
            (self._encode(batch) for batch in self._single_batches()),
            self._source,
            goes_on=lambda: self._rank_zero_decides(self._progress() < start + _LEARNING_SHARE),
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
        scaler.scale(torch.zeros(1, device=self.module.device))  # has no scale to change before
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
        with self.trainer.precision_plugin.forward_context():
            return self.module.clean(batch)

    def _source(self, *key: int | str) -> torch.Generator:
        device = self.module.device
        return generator(self.module.run_seed, rank(), "audit", *key, device=device)

    def _noise_levels(self) -> Tensor:
        middle = (torch.arange(_LEVELS, device=self.module.device) + 0.5) / _LEVELS
        return self.module.schedule.noise_level(self.module.timesteps.icdf(middle))

    def _time(self) -> CostModel:
        """Time what steps share, and how the current one depends on the size of the batch."""
        start = self._progress()
        batch, _ = next(self.batches)
        clean = self._encode(batch)
        self.batch = len(clean.x0)
        timer = StepTimer(self.trainer, self.module, self.measurement)
        timer.warm_up(self.candidates, clean)
        self.shared, cost = timer.measure(
            clean,
            encode=lambda: self._encode(batch),
            goes_on=lambda: self._rank_zero_decides(self._progress() < start + _TIMING_SHARE),
        )
        return cost

    def _measure_levels(self, found: GradientStatistics) -> None:
        """Measure the current estimator in bins of the noise level."""
        until, number = self._progress() + _LEVEL_SHARE, 0
        pair = [self._encode(batch) for batch in next(self.batches)]
        is_enough = least(len(pair[0].x0), self.module.device) >= 2 * _LEVELS
        is_possible = is_enough and self.measurement.why_unavailable(pair[0]) is None
        is_per_sample = least(is_possible, self.module.device) == 1
        while self._rank_zero_decides(number == 0 or self._progress() < until):
            if number and number % _LEVELS == 0:
                pair = [self._encode(batch) for batch in next(self.batches)]
            key, level = ("level", number), number % _LEVELS
            if is_per_sample:
                clean = pair[0].rows(slice(0, _LEVEL_SAMPLES))
                parts = self.measurement.per_sample_by_level(clean, _LEVELS, *key)
                levels, number = dict(enumerate(parts)), number + _LEVELS
            else:
                edges = {"low": level / _LEVELS, "high": (level + 1) / _LEVELS}
                levels = {level: self.measurement.by_differences(pair, *key, **edges)}
                number += 1
            for each, components in levels.items():
                found.add_level(each, components.over_ranks(self.module.device))

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
                open_ = [
                    c
                    for c in open_
                    if not self._rank_zero_decides(self._savings(c)[1].high < _LOST)
                ]
                left, whole = (
                    sum(float(self._seconds(c).median()) for c in some)
                    for some in (open_, self.candidates)
                )
                longest *= left / whole

    def _measure(self, candidate: Candidate, pair: list[Clean], number: int) -> None:
        self.measurement.reset_seconds()
        with candidate.in_place(self.module):
            components = self.measurement.by_differences(pair, "repeat", number)
        self.found[candidate.name].append(components.over_ranks(self.module.device))
        seconds = torch.tensor(self.measurement.step_seconds(), device=self.module.device)
        self.seconds[candidate.name].append(all_reduce_mean(seconds).cpu())

    def _seconds(self, candidate: Candidate) -> Tensor:
        """Return the seconds of a step in each repetition."""
        return torch.stack(self.seconds[candidate.name]) + self.shared

    def _savings(self, candidate: Candidate) -> tuple[Interval, Interval]:
        """Return RE and ECM."""
        if candidate.name == _OWN:
            return Interval(1.0, 1.0, 1.0), Interval(1.0, 1.0, 1.0)
        own, base = (
            torch.stack([components.total[0] for components in self.found[name]])
            for name in (candidate.name, _OWN)
        )
        efficiency = relative_efficiency(base[: len(own)], own)
        present = self._seconds(self.candidates[0])[: len(own)]
        return efficiency, effective_compute_multiplier(
            efficiency, present, self._seconds(candidate)
        )

    def _compare(self, candidate: Candidate) -> MeasuredEstimator:
        efficiency, multiplier = self._savings(candidate)
        moments = Moments(5, 1 + len(self.names))
        for components in self.found[candidate.name]:
            moments.add(torch.stack(components))
        draws = candidate.draws or self.module.draws
        return MeasuredEstimator(
            candidate.name,
            Components(*moments.mean),
            Components(*moments.error),
            float(self._seconds(candidate).median()),
            efficiency,
            multiplier,
            self._config(candidate),
            draws.draws_per_sample,
        )

    def _config(self, candidate: Candidate) -> dict[str, Any] | None:
        if candidate.name == _OWN:
            slots = {name: getattr(self.module, name) for name in SLOTS}
            return {name: settings(slot) for name, slot in slots.items() if slot is not None}
        try:
            return candidate.config()
        except UndescribableError:
            return None

    def _rank_zero_decides(self, decision: bool) -> bool:
        self.module.stop_if_asked()
        return bool(broadcast(torch.tensor(decision, device=self.module.device)))

    def _progress(self) -> float:
        """Show and return the share of the budget that is spent."""
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
