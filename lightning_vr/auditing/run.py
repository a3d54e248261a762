"""The audit itself: candidates side by side on one trainer, within a budget of seconds.

Each repetition takes two batches of the training set. On these every estimator gets the same times
and the same noise, and eight ordinary backward passes at the batch size of training fill the nested
design of ``variance.components``; what an estimator shares within a batch is part of its variance.
Estimators differ by what they do with equal draws, so that their ratios are far more precise than
the variances; intervals come from a bootstrap over repetitions. Steps are timed in turn, optimizer
included, loading of data not.
"""

import time
import warnings
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor
from tqdm.auto import tqdm

from lightning_vr.auditing.candidates import Candidate, check_candidates, default_candidates
from lightning_vr.auditing.pairs import batch_pairs
from lightning_vr.auditing.result import Audit, Measured
from lightning_vr.auditing.timing import StepTimer
from lightning_vr.checks import check_clean
from lightning_vr.configuration import UndescribableError
from lightning_vr.distributed import all_reduce_sum, broadcast, rank, world_size
from lightning_vr.module import DiffusionModule
from lightning_vr.noisy_losses import DiffusionLoss
from lightning_vr.rng import generator, undisturbed
from lightning_vr.training_set import encoded_training_set, training_loader
from lightning_vr.types import Clean
from lightning_vr.variance.accounting import (
    CostModel,
    effective_compute_multiplier,
    relative_efficiency,
)
from lightning_vr.variance.bootstrap import Interval
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradients import GradientMeasurement, parameter_groups
from lightning_vr.variance.moments import Moments
from lightning_vr.variance.statistics import GradientStatistics

_LEVELS = 8
_LEVEL_SAMPLES = 32
_LEVEL_SHARE = 0.2
"""Share of the budget for the bins of the noise level."""

_TIMING_SHARE = 0.2
_LEAST_REPETITIONS = 3


def audit(
    module: DiffusionModule,
    datamodule: LightningDataModule,
    candidates: list[Candidate] | None = None,
    *,
    budget: float = 120.0,
    trainer: Trainer | None = None,
    progress: bool = True,
) -> Audit:
    """Measure what the module's estimator and its rivals cost and save, at its present weights.

    Neither the module nor the global random state is changed.

    Args:
        module: The module to audit.
        datamodule: Its training data.
        candidates: What to compare with; the estimators that ship if not given.
        budget: Seconds to spend; more only if the least number of repetitions needs it.
        trainer: Gives device, precision and ranks; a new one on this machine if not given. Its
            callbacks are not run, and it is of no further use.
        progress: Whether to show a progress bar.

    Raises:
        MisconfigurationException: If the module is no DiffusionModule, or the trainer starts its
            processes by fork or spawn.
        ValueError: If the budget is not positive, a candidate fills no slot or names repeat, or an
            epoch has fewer than two whole batches.
    """
    _check(module, candidates, budget, trainer)
    if trainer is None:
        trainer = Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    callback = _AuditCallback(candidates, budget, progress)
    state: Any = {name: getattr(module, name) for name in ("seed", "estimate", "sample_shape")}
    others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    savers = [other for other in others if isinstance(other, SaveConfigCallback)]
    trainer.callbacks = [*savers, callback]  # type: ignore[attr-defined]
    trainer.limit_val_batches = 0
    trainer.fit_loop.max_epochs = 1
    with undisturbed(), warnings.catch_warnings():
        # nothing is validated
        warnings.filterwarnings("ignore", "You defined a `validation_step` but")
        trainer.fit(module, datamodule=datamodule)
    for name, value in state.items():
        setattr(module, name, value)
    assert callback.result is not None
    return callback.result


def _check(
    module: Any, candidates: list[Candidate] | None, budget: float, trainer: Trainer | None
) -> None:
    if not budget > 0:
        raise ValueError(f"Argument `budget` expected to be positive, but got {budget}.")
    if not isinstance(module, DiffusionModule):
        raise MisconfigurationException(
            f"audit expected a DiffusionModule, whose estimators can be exchanged, but got a "
            f"{type(module).__name__}: measure it with the callback GradientVariance."
        )
    if trainer is not None and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            "audit cannot bring its result back from processes that the trainer forks or spawns: "
            "use one device, or strategy='ddp' in a script of its own."
        )
    check_candidates(candidates or [])


class _AuditCallback(Callback):
    """Audits where training would begin, and ends it before the first step."""

    def __init__(self, candidates: list[Candidate] | None, budget: float, progress: bool) -> None:
        self.candidates = candidates
        self.budget = budget
        self.progress = progress
        self.result: Audit | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        run = _Run(trainer, pl_module, self.candidates, self.budget, self.progress)
        self.result = run.measure()
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step


class _Run:
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
        self.bar = tqdm(
            total=round(budget),
            desc="Audit",
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s",
            disable=not (progress and trainer.is_global_zero),
        )
        self.loader = training_loader(trainer)
        size = len(self.loader.dataset)  # type: ignore[arg-type]
        rivals = default_candidates(module, size) if candidates is None else candidates
        self.skipped: dict[str, str] = {}
        self.candidates = [Candidate("current"), *self._filled(rivals)]
        loss = DiffusionLoss(module, trainer.precision_plugin.forward_context)
        self.names, groups = parameter_groups(module)
        self.measurement = GradientMeasurement(loss, self._source, groups)
        self.batches = batch_pairs(trainer, self.loader)
        self.batch = 0

    def measure(self) -> Audit:
        with self.bar:
            self.bar.set_description("Audit: timing")
            seconds, cost = self._time()
            self.bar.set_description("Audit: noise levels")
            statistics = GradientStatistics(self.names, self._noise_levels())
            self._measure_levels(statistics)
            self.bar.set_description("Audit: candidates")
            found = self._repeat()
        for components in found["current"]:
            statistics.add(components)
        estimators = [self._compare(c, found, seconds) for c in self.candidates]
        return Audit(
            estimators,
            statistics,
            batch=self.batch * world_size(),
            cost=cost,
            repetitions=len(found["current"]) * world_size(),
            seconds=time.perf_counter() - self.start,
            skipped=self.skipped,
        )

    def _filled(self, candidates: list[Candidate]) -> list[Candidate]:
        """Give candidates their references, encoded once; leave out what cannot have any."""
        needs = [c for c in candidates if c.target is not None and c.target.bank_size != 0]
        data: Clean | None = None
        if needs:
            data = encoded_training_set(self.trainer, self._encode_row, "Encoding references")
        for candidate in needs:
            assert candidate.target is not None
            if data is None:
                self.skipped[candidate.name] = "samples have a condition beyond class labels"
            elif data.index is None and getattr(candidate.target, "references", None) == "all":
                self.skipped[candidate.name] = "batches carry no sample indices"
            else:
                is_indexed = data.index is not None
                candidate.target.fill(data.x0, data.group, indexed=is_indexed)
        return [candidate for candidate in candidates if candidate.name not in self.skipped]

    def _encode_row(self, positions: Tensor, batch: Any) -> Clean:
        clean = self.module.clean(batch)
        check_clean(clean, self.module.num_classes, positions)
        return clean

    @torch.no_grad()
    def _encode(self, batch: Any) -> Clean:
        with self.trainer.precision_plugin.forward_context():
            return self.module.clean(batch)

    def _source(self, *key: int | str) -> torch.Generator:
        device = self.module.device
        return generator(self.module.run_seed, rank(), "audit", *key, device=device)

    def _noise_levels(self) -> Tensor:
        middle = (torch.arange(_LEVELS, device=self.module.device) + 0.5) / _LEVELS
        return self.module.schedule.noise_level(self.module.timesteps.icdf(middle))

    def _time(self) -> tuple[dict[str, Tensor], CostModel]:
        batch, _ = next(self.batches)
        clean = self._encode(batch)
        self.batch = len(clean.x0)
        timer = StepTimer(self.trainer, self.module, self.measurement)
        found, cost = timer.measure(
            self.candidates,
            clean,
            encode=lambda: self._encode(batch),
            goes_on=lambda: self._agree(self._progress() < _TIMING_SHARE),
        )
        means = all_reduce_sum(torch.stack(list(found.values())).to(self.module.device))
        return dict(zip(found, means.cpu() / world_size(), strict=True)), cost

    def _measure_levels(self, found: GradientStatistics) -> None:
        """Measure the current estimator in bins of the noise level."""
        until, number = self._progress() + _LEVEL_SHARE, 0
        pair = [self._encode(batch) for batch in next(self.batches)]
        is_enough = len(pair[0].x0) >= 2 * _LEVELS
        is_per_sample = is_enough and self.measurement.obstacle(pair[0]) is None
        while self._agree(number == 0 or self._progress() < until):
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

    def _repeat(self) -> dict[str, list[Components]]:
        """Measure every candidate on the same draws until the budget is spent."""
        found: dict[str, list[Components]] = {c.name: [] for c in self.candidates}
        number, longest = 0, 0.0
        while self._agree(number < _LEAST_REPETITIONS or self._progress() + longest < 1):
            start = self._progress()
            pair = [self._encode(batch) for batch in next(self.batches)]
            for candidate in self.candidates:
                with candidate.in_place(self.module):
                    components = self.measurement.by_differences(pair, "repeat", number)
                found[candidate.name].append(components.over_ranks(self.module.device))
            number, longest = number + 1, max(longest, self._progress() - start)
        return found

    def _compare(
        self, candidate: Candidate, found: dict[str, list[Components]], seconds: dict[str, Tensor]
    ) -> Measured:
        own, base = (
            torch.stack([components.total[0] for components in found[name]])
            for name in (candidate.name, "current")
        )
        efficiency, multiplier = Interval(1.0, 1.0, 1.0), Interval(1.0, 1.0, 1.0)
        if candidate.name != "current":
            times = seconds["current"], seconds[candidate.name]
            efficiency = relative_efficiency(base, own)
            multiplier = effective_compute_multiplier(efficiency, *times)
        moments = Moments(5, 1 + len(self.names))
        for components in found[candidate.name]:
            moments.add(torch.stack(components))
        try:
            config = candidate.config() or None
        except UndescribableError:
            config = None
        return Measured(
            candidate.name,
            Components(*moments.mean),
            Components(*moments.error),
            float(seconds[candidate.name].median()),
            efficiency,
            multiplier,
            config,
        )

    def _agree(self, decision: bool) -> bool:
        return bool(broadcast(torch.tensor(decision, device=self.module.device)))

    def _progress(self) -> float:
        """Show and return the share of the budget that is spent."""
        elapsed = time.perf_counter() - self.start
        self.bar.update(min(self.bar.total, int(elapsed)) - self.bar.n)
        return elapsed / self.budget
