"""The audit of a module: a trainer measures instead of training."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_vr.auditing.candidates import Candidate, check_candidates
from lightning_vr.auditing.measurement import AuditMeasurement
from lightning_vr.auditing.result import Audit
from lightning_vr.core.rng import preserve_global_rng
from lightning_vr.core.validation import check_positive
from lightning_vr.lifecycle.quiet_trainer import quiet_trainer
from lightning_vr.training.module import DiffusionModule

_MODULE_STATE = ("seed", "estimate", "sample_shape")
"""What a trainer sets on a module before its first step."""


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

    Neither the module nor the global random state is changed, also if the audit fails. Draws that
    learn are measured as they are in the middle of training: a proposal has seen batches, and
    ``resamples="auto"`` takes the K that its pilot chooses here. The module's own draws keep what
    they have learned in training; if they have not learned yet, a copy of them learns. The same
    holds for control variates, which are fitted on separate batches. Where the gate stays closed
    nothing is measured, and the result says so.

    Args:
        module: The module to audit.
        datamodule: Its training data.
        candidates: What to compare with; by default the estimators of this package.
        budget: Seconds to spend; more only if the smallest number of repetitions or a proposal that
            still has to learn needs it.
        trainer: Gives device, precision and ranks; by default a new one on this machine. Its
            callbacks are not run, and it cannot be used again.
        progress: Whether to show a progress bar.

    Raises:
        MisconfigurationException: If the module is not a DiffusionModule, or the trainer starts its
            processes by fork or spawn.
        ValueError: If the budget is not positive and finite, a candidate fills no slot or names
            repeat, or an epoch has fewer than two whole batches.
    """
    _check(module, candidates, budget, trainer)
    callback = _AuditCallback(candidates, budget, progress)
    with quiet_trainer():
        if trainer is None:
            trainer = Trainer(
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
        with _restored(module, *_MODULE_STATE), _restored_settings(trainer):
            _set_up(trainer, callback)
            with preserve_global_rng():
                trainer.fit(module, datamodule=datamodule)
    assert callback.result is not None
    return callback.result


@contextmanager
def _restored(owner: Any, *names: str) -> Iterator[None]:
    """Put attributes back afterwards, also after an error."""
    before = {name: getattr(owner, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def _restored_settings(trainer: Trainer) -> Iterator[None]:
    """Put the settings of a trainer back afterwards, also after an error."""
    with (
        _restored(trainer, "callbacks", "limit_val_batches"),
        _restored(trainer.fit_loop, "max_epochs"),
        _restored(trainer.fit_loop.epoch_loop, "max_steps"),
    ):
        yield


def _set_up(trainer: Trainer, callback: Callback) -> None:
    """Let a trainer run the callback alone, in one epoch."""
    others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    savers = [other for other in others if isinstance(other, SaveConfigCallback)]
    trainer.callbacks = [*savers, callback]  # type: ignore[attr-defined]
    trainer.limit_val_batches = 0
    trainer.fit_loop.max_epochs = 1


def _check(
    module: Any, candidates: list[Candidate] | None, budget: float, trainer: Trainer | None
) -> None:
    check_positive("budget", budget)
    if not isinstance(module, DiffusionModule):
        raise MisconfigurationException(
            f"`module` must be a DiffusionModule, whose estimators can be exchanged, got a "
            f"{type(module).__name__}: measure it with the callback GradientVariance."
        )
    if trainer is not None and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            "`audit` cannot return a result from processes that the trainer forks or spawns: use "
            "one device, or strategy='ddp' in a script of its own."
        )
    check_candidates(candidates or [])


class _AuditCallback(Callback):
    """Audits where training would begin, and ends training before the first step."""

    def __init__(self, candidates: list[Candidate] | None, budget: float, progress: bool) -> None:
        self.candidates = candidates
        self.budget = budget
        self.progress = progress
        self.result: Audit | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        # slots learn, but the module's own must not
        draws, control_variate = copy.deepcopy((pl_module.draws, pl_module.control_variate))
        with Candidate("own", draws=draws, control_variate=control_variate).in_place(pl_module):
            run = AuditMeasurement(trainer, pl_module, self.candidates, self.budget, self.progress)
            self.result = run.measure()
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
