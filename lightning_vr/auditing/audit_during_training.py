"""AuditDuringTraining: what would pay now, again and again while a model trains.

What pays early differs from what pays late: the gradient's signal falls in training, so noise
becomes the bottleneck, and its parts change. Each audit takes the batches that training takes, at
the weights of that time, and draws of its own.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_vr.auditing.audit_history import AuditHistory
from lightning_vr.auditing.candidate_measurement import CandidateMeasurement
from lightning_vr.auditing.candidates import (
    CURRENT,
    Candidate,
    check_candidates,
    check_exchangeable,
)
from lightning_vr.auditing.comparison import Comparison
from lightning_vr.auditing.default_candidates import few_candidates_for
from lightning_vr.auditing.preparation import own_copies, with_own_state
from lightning_vr.callbacks.cadence import TIME_BUDGET
from lightning_vr.callbacks.probe_choice import check_strategy
from lightning_vr.core.batches import batch_size
from lightning_vr.core.distributed import all_reduce_mean, broadcast, world_size
from lightning_vr.core.rng import preserve_global_rng
from lightning_vr.core.validation import check_at_least
from lightning_vr.lifecycle.curve_log import CurveLog, log_rows, open_curve_log
from lightning_vr.lifecycle.loggers import log_numbers
from lightning_vr.lifecycle.training_set import training_batches, training_loader
from lightning_vr.training.estimator_module import EstimatorModule

_PASSES = 8
"""Passes of a repetition for each candidate."""

_LOOKS_EVERY = 10
"""Batches from one look at the clock to the next, which ranks must share."""


class AuditDuringTraining(Callback):
    """Repeats a small audit while a module trains whose estimators can be exchanged.

    Each audit adds rows to ``audit_during_training.csv`` in the run's folder, and sends
    ``audit/noise_ratio`` and ``audit/saving/<candidate>`` to the loggers: how many times less
    compute the noise-ratio model expects from then on (``variance.accounting``). The end of ``fit``
    says what would have paid early and late. The weights of the run are the same with and without
    it. Seconds of a step are those of training, the passes of each candidate exchanged.

    Args:
        candidates: What to compare with; by default an STF, strata with a learned proposal, and
            antithetic pairs, or three of other draws and views where there is a frozen teacher.
        every_n_steps: Audit at one in this many optimizer steps. By default as often as takes
            about 2 % of the training time. The first audit is taken to need as many passes as 384
            steps (16 for each repetition of each estimator), so it comes after some 19,000 steps:
            a shorter run has none without this argument.
        repetitions: Of each audit, each on two batches of training.

    Attributes:
        history: What each audit has found.

    Raises:
        ValueError: If a number is out of range, a candidate fills no slot, or names repeat.
    """

    def __init__(
        self,
        candidates: list[Candidate] | None = None,
        every_n_steps: int | None = None,
        repetitions: int = 6,
    ) -> None:
        check_candidates(candidates or [])
        check_at_least("every_n_steps", 1 if every_n_steps is None else every_n_steps, 1)
        check_at_least("repetitions", repetitions, 3)
        self.candidates = candidates
        self.every_n_steps = every_n_steps
        self.repetitions = repetitions
        self.history = AuditHistory()
        self._spent = self._trained = 0.0
        self._cost: float | None = None
        self._logged_step = self._audited_step = -1
        self._curves: CurveLog | None = None
        self._rivals: list[Candidate] | None = None
        self._measuring: CandidateMeasurement | None = None
        self._comparison: Comparison | None = None
        self._pending: Any = None
        self._number, self._present_cost = 0, 0.0
        self._durations: deque[float] = deque(maxlen=50)
        self._last_start: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if the estimators of a module cannot be exchanged.

        Raises:
            MisconfigurationException: If the module has none, or its weights are sharded.
            ValueError: If a candidate fills a slot that the module lacks.
        """
        check_exchangeable(pl_module)
        check_candidates(self.candidates or [], pl_module)
        check_strategy(trainer, "AuditDuringTraining")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file; an audit under way does not go on in another run."""
        self._comparison = self._pending = self._last_start = None
        self._rivals = self._measuring = None
        self._curves = open_curve_log(
            trainer, "audit_during_training", AuditHistory.columns, self._logged_step
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin an audit that is due, or go on with one."""
        assert isinstance(pl_module, EstimatorModule)
        start = time.perf_counter()
        if self._last_start is not None:
            self._durations.append(start - self._last_start)
            self._trained += 1
        self._last_start = start
        if self._comparison is None and not self._is_due(trainer, batch_idx, pl_module.device):
            return
        if self._comparison is None:
            self._present_cost = 0.0
        with preserve_global_rng():
            self._audit(trainer, pl_module, batch)
        self._last_start = time.perf_counter()
        # in steps timed just before: what else the machine does slows both
        steps = (self._last_start - start) / statistics.median(self._durations or [math.inf])
        self._spent += steps
        self._present_cost += steps
        if self._comparison is None:
            self._cost = max(self._cost or 0.0, self._present_cost)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not take the seconds of a validation for those of a step."""
        self._last_start = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what would have paid early and late."""
        rank_zero_info(self.history.summary() or self._reason_for_none())
        self._rivals = self._measuring = None

    def state_dict(self) -> dict[str, Any]:
        """Return what audits have found and taken so far."""
        return {
            "history": self.history.state(),
            "spent": self._spent,
            "trained": self._trained,
            "cost": self._cost,
            "logged_step": self._logged_step,
            "audited_step": self._audited_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the findings of a checkpoint."""
        self.history = AuditHistory(state_dict["history"])
        self._spent, self._trained = state_dict["spent"], state_dict["trained"]
        self._cost = state_dict["cost"]
        self._logged_step = state_dict["logged_step"]
        self._audited_step = state_dict["audited_step"]

    def _reason_for_none(self) -> str:
        reason = "one audit takes more than 2 % of this run. Pass `every_n_steps` to have some."
        if self.every_n_steps is not None:
            batches = 2 * self.repetitions
            reason = f"one audit takes {batches} whole batches, and the run ended before."
        return f"AuditDuringTraining has measured nothing: {reason}"

    def _is_due(self, trainer: Trainer, batch_idx: int, device: torch.device) -> bool:
        step = trainer.global_step
        if self.every_n_steps is not None:
            # a step of manual optimization may count as several
            return step // self.every_n_steps > max(0, self._audited_step) // self.every_n_steps
        if batch_idx % _LOOKS_EVERY or not self._durations:
            return False
        cost = self._cost
        if cost is None:
            # passes with more draws of each sample take longer
            rivals = 3 if self.candidates is None else len(self.candidates)
            cost = 2 * _PASSES * self.repetitions * (1 + rivals)
        is_due = self._spent + cost <= TIME_BUDGET * self._trained
        return bool(broadcast(torch.tensor(is_due, device=device)))

    def _audit(self, trainer: Trainer, module: EstimatorModule, batch: Any) -> None:
        """Take a batch, and measure on every second one."""
        with own_copies(module).in_place(module):
            if self._comparison is None:
                self._begin(trainer, module, batch)
                return
            if self._pending is None:
                self._pending = batch
                return
            if batch_size(batch) != batch_size(self._pending):
                return  # the last one of an epoch
            assert self._measuring is not None
            assert self._rivals is not None
            pair, self._pending = [self._pending, batch], None
            self._measuring.repeat(
                self._comparison, [Candidate(CURRENT), *self._rivals], pair, self._number
            )
        self._number += 1
        if self._number == self.repetitions:
            self._finish(trainer, module)

    def _begin(self, trainer: Trainer, module: EstimatorModule, batch: Any) -> None:
        """Prepare candidates at the present weights."""
        is_first = self._measuring is None
        if self._measuring is None or self._rivals is None:
            self._measuring = CandidateMeasurement(trainer, module)
            few = few_candidates_for(module, training_loader(trainer))
            self._rivals = with_own_state(few if self.candidates is None else self.candidates)
        with closing(_batches(trainer)) as batches:
            reasons = self._measuring.prepare(
                [Candidate(CURRENT), *self._rivals],
                lambda: batches,
                goes_on=lambda: False,
                has_references=not is_first,
            )
        for name, why in reasons.items():
            rank_zero_info(f"AuditDuringTraining does not measure {name}: {why}.")
        self._rivals = [c for c in self._rivals if c.name not in reasons]
        samples = len(self._measuring.encode(batch).x0)
        self._comparison = Comparison(module, samples * world_size())
        self._pending, self._number = batch, 0
        self._audited_step = trainer.global_step

    def _finish(self, trainer: Trainer, module: EstimatorModule) -> None:
        """Log what an audit has found."""
        comparison, rivals = self._comparison, self._rivals
        assert comparison is not None
        assert rivals is not None
        passes = statistics.median(comparison.present.seconds)
        shared = max(0.0, statistics.median(self._durations or [passes]) - passes)
        device = module.device
        comparison.add_seconds(float(all_reduce_mean(torch.tensor(shared, device=device))))
        found = [comparison.estimator(c, len(rivals)) for c in rivals]
        rows = self.history.add(self._audited_step, comparison, found)
        self._logged_step = trainer.global_step
        log_numbers(trainer, self.history.numbers())
        log_rows(trainer, self._curves, rows)
        self._comparison = None


def _batches(trainer: Trainer) -> Generator[Any, None, None]:
    """Yield batches of the training set without end, by a loader of their own."""
    while True:
        with closing(training_batches(trainer, "Audit")) as epoch:
            for _, batch in epoch:
                yield batch
