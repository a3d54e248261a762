"""The measurement itself: two looks at candidates on one trainer, within a budget of seconds.

The first look measures all candidates in a few repetitions. The second one measures what it leaves
open, combinations of its winners included, on fresh batches and draws: it alone gives the numbers
of these finalists. Intervals are those of ``variance.intervals`` over repetitions.

What the clock decides is how many repetitions a look has, through the seconds of steps which
candidates are the finalists, and which the budget has no time for.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm

from lightning_vr.auditing.batch_pairs import batch_pairs
from lightning_vr.auditing.candidate_measurement import CandidateMeasurement
from lightning_vr.auditing.candidates import CURRENT, Candidate
from lightning_vr.auditing.comparison import Comparison, Repetitions
from lightning_vr.auditing.default_candidates import candidates_for
from lightning_vr.auditing.finalists import finalists
from lightning_vr.auditing.least_repetitions import LEAST_REPETITIONS, affordable, still_needed
from lightning_vr.auditing.measured_estimator import MeasuredEstimator
from lightning_vr.auditing.preparation import least_draws, with_own_state
from lightning_vr.auditing.result import Audit
from lightning_vr.auditing.step_cost import StepCost
from lightning_vr.auditing.step_timing import StepTimer
from lightning_vr.core.distributed import broadcast, world_size
from lightning_vr.core.types import Clean
from lightning_vr.lifecycle.precision import loss_scale, loss_scaler
from lightning_vr.lifecycle.stopping import raise_if_asked
from lightning_vr.lifecycle.training_set import training_loader
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_statistics import GradientStatistics
from lightning_vr.variance.nested_measurement import NestedMeasurement

_LEVELS = 8
_LEVEL_SAMPLES = 32
_LEVEL_BUDGET = 0.1
"""Fraction of the budget for the bins of the noise level."""

_TIMING_BUDGET = 0.05
_LEARNING_BUDGET = 0.05

_FIRST_LOOK = 0.5
"""Fraction of what preparation has left of the budget for the first look."""


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
        module: EstimatorModule,
        candidates: list[Candidate] | None,
        budget: float,
        progress: bool,
    ) -> None:
        self.trainer, self.module = trainer, module
        self.start, self.budget = time.perf_counter(), budget
        loader = training_loader(trainer)
        rivals = candidates_for(module, loader) if candidates is None else candidates
        self.fresh = {candidate.name: candidate for candidate in rivals}
        self.current = Candidate(CURRENT)
        self.rivals = with_own_state(rivals)
        self.skipped: dict[str, str] = {}
        self.measuring = CandidateMeasurement(trainer, module)
        self.batches = batch_pairs(trainer, loader)
        self.batch, self.shared_seconds, self.number = 0, 0.0, 0
        self.bar = _bar(budget, is_shown=progress and trainer.is_global_zero)

    def measure(self) -> Audit:
        """Run the audit; all ranks must call it."""
        with self.bar:
            self._find_loss_scale()
            self.rivals = self._prepared(self.rivals)
            cost = self._time()
            levels = self.module.objective.noise_levels(_LEVELS)
            statistics = GradientStatistics(
                self.measuring.names, levels, parts=self.module.variance_parts
            )
            self._measure_levels(statistics)
            first, second, found = self._look_twice()
        present, again = first.present, second.present if second else Repetitions()
        whole = present.plus(again)
        for components in whole.components:
            statistics.add(Components(*components))
        return Audit(
            [first.current(whole), *found.values()],
            statistics,
            batch=self.batch * world_size(),
            cost=cost,
            repetitions=len(present.seconds) * world_size(),
            second_repetitions=len(again.seconds) * world_size(),
            seconds=time.perf_counter() - self.start,
            budget=self.budget,
            skipped=self.skipped,
            least_draws=least_draws(self.module.draws),
        )

    def _look_twice(self) -> tuple[Comparison, Comparison | None, dict[str, MeasuredEstimator]]:
        """Return both looks, the second one if anything is left open, and what they say."""
        prepared = self._progress()
        until = prepared + _FIRST_LOOK * (1 - prepared)
        first, rivals = self._look("first look", self.rivals, 0, until)
        found = {c.name: first.estimator(c) for c in rivals}
        likely = {c.name: first.likely_speedup(c) for c in rivals}
        again = finalists(rivals, self.fresh, found, likely)
        new = self._prepared([c for c in again if c.name not in found], has_references=True)
        again = [c for c in again if c.name in found or c in new]
        if not again:
            return first, None, found
        second, again = self._look("second look", again, 1, 1.0)
        return first, second, found | {c.name: second.estimator(c, len(again)) for c in again}

    def _prepared(
        self, candidates: list[Candidate], *, has_references: bool = False
    ) -> list[Candidate]:
        """Prepare candidates on separate batches, and return those that can be measured."""
        self.bar.set_description("Audit: preparation")
        until = self._progress() + _LEARNING_BUDGET
        own = [] if has_references else [self.current]
        reasons = self.measuring.prepare(
            [*own, *candidates],
            self._single_batches,
            goes_on=lambda: self._rank_zero_decides(self._progress() < until),
            has_references=has_references,
        )
        self.skipped |= reasons
        return [c for c in candidates if c.name not in reasons]

    def _find_loss_scale(self) -> None:
        """Lower the scale of losses until gradients are finite, as training in float16 begins."""
        scaler, gradients = loss_scaler(self.trainer), self.measuring.gradients
        if scaler is None:
            return
        scaler.scale(torch.zeros(1, device=self.module.device))  # creates the scale to change
        gradients.loss_scale = loss_scale(self.trainer)
        pair = self._encoded_pair()
        while gradients.loss_scale > 1:
            found = gradients.by_differences(pair, "loss scale")
            if bool(torch.isfinite(found.over_ranks(self.module.device).total).all()):
                return
            # by more than training does: other candidates may have larger gradients
            scaler.update(max(1.0, gradients.loss_scale / 16))
            gradients.loss_scale = loss_scale(self.trainer)

    def _single_batches(self) -> Iterator[Any]:
        while True:
            for batch in next(self.batches):
                raise_if_asked(self.trainer)
                yield batch

    def _pair(self) -> list[Any]:
        raise_if_asked(self.trainer)
        return [*next(self.batches)]

    def _encoded_pair(self) -> list[Clean]:
        return [self.measuring.encode(batch) for batch in self._pair()]

    def _time(self) -> StepCost:
        """Time what steps share, and how the current one depends on the size of the batch."""
        self.bar.set_description("Audit: timing")
        until = self._progress() + _TIMING_BUDGET
        batch, _ = next(self.batches)
        clean = self.measuring.encode(batch)
        self.batch = len(clean.x0)
        timer = StepTimer(self.trainer, self.module, self.measuring.gradients)
        timer.warm_up([self.current, *self.rivals], clean)
        self.shared_seconds, cost = timer.measure(
            clean,
            encode=lambda: self.measuring.encode(batch, "timing"),
            other=lambda: self.measuring.other_work(batch),
            goes_on=lambda: self._rank_zero_decides(self._progress() < until),
        )
        return cost

    def _measure_levels(self, found: GradientStatistics) -> None:
        """Measure the current estimator in bins of the noise level."""
        self.bar.set_description("Audit: noise levels")
        until, number, device = self._progress() + _LEVEL_BUDGET, 0, self.module.device
        pair = self._encoded_pair()
        nested = NestedMeasurement(self.measuring.gradients, pair[0], device, samples=2 * _LEVELS)
        while self._rank_zero_decides(number == 0 or self._progress() < until):
            if number and number % _LEVELS == 0:
                pair = self._encoded_pair()
            batches = pair
            if nested.is_per_sample:
                batches = [pair[0].rows(slice(0, _LEVEL_SAMPLES))]
            levels = nested.levels(batches, _LEVELS, number, "level", number)
            number += len(levels)
            for level, components in levels.items():
                found.add_level(level, components.over_ranks(device))

    def _look(
        self, title: str, rivals: list[Candidate], look: int, until: float
    ) -> tuple[Comparison, list[Candidate]]:
        """Measure candidates on the same draws until a fraction of the budget is spent.

        Returns:
            What was measured, and the candidates that the budget suffices for.
        """
        self.bar.set_description(f"Audit: {title}")
        comparison = Comparison(self.module, self.batch * world_size())
        number, longest, least = 0, 0.0, LEAST_REPETITIONS[look]
        while self._rank_zero_decides(number < least or self._progress() + longest < until):
            start = self._progress()
            pair = self._pair()
            candidates = [self.current, *rivals]
            self.measuring.repeat(comparison, candidates, pair, self.number, self.shared_seconds)
            number, self.number = number + 1, self.number + 1
            longest = max(longest, self._progress() - start)
            if number == 1:
                rivals, longest = self._affordable(comparison, rivals, look, longest)
        return comparison, rivals

    def _affordable(
        self, comparison: Comparison, rivals: list[Candidate], look: int, repetition: float
    ) -> tuple[list[Candidate], float]:
        """Drop the last candidates if the budget does not suffice, which one repetition tells.

        Args:
            comparison: With one repetition of each estimator.
            rivals: The candidates in it.
            look: 0 for the first look, 1 for the second one.
            repetition: Fraction of the budget that it took.

        Returns:
            The other candidates, and the fraction of the budget that a repetition of them takes.
        """
        steps = comparison.first_seconds([CURRENT, *(c.name for c in rivals)])
        scale = repetition * self.budget / sum(steps)
        seconds = [scale * step for step in steps]
        left = (1 - self._progress()) * self.budget
        count = int(self._from_rank_zero(affordable(seconds, look, left)))
        seconds, dropped = seconds[: count + 1], [c.name for c in rivals[count:]]
        # what the first look has measured already stays in the result
        unknown = dropped if look == 0 else [name for name in dropped if name not in self.fresh]
        self.skipped |= dict.fromkeys(unknown, f"the budget of {self.budget:g} s is too small")
        needed = still_needed(seconds, look)
        if look == 0 and needed > left:
            self.bar.total = round(self.budget - left + needed)
            rank_zero_info(
                f"The audit needs about {self.budget - left + needed:.0f} s, more than its budget "
                f"of {self.budget:g} s, for the least repetitions of {count + 1} estimators."
            )
        return rivals[:count], sum(seconds) / self.budget

    def _rank_zero_decides(self, decision: bool) -> bool:
        self.module.stop_if_asked()
        return bool(self._from_rank_zero(decision))

    def _from_rank_zero(self, number: int) -> Tensor:
        return broadcast(torch.tensor(number, device=self.module.device))

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
