"""The audit of a module: a trainer that is about to train measures instead."""

import copy
import warnings
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_vr.auditing.candidates import Candidate, check_candidates
from lightning_vr.auditing.measurement import Measuring
from lightning_vr.auditing.result import Audit
from lightning_vr.core.rng import preserve_global_rng
from lightning_vr.training.module import DiffusionModule


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

    Neither the module nor the global random state is changed. Draws that learn are measured as they
    are in the midst of training: a proposal has seen batches, and ``resamples="auto"`` takes the K
    that its pilot chooses here. The module's own draws keep what they have learned in training; if
    that is nothing yet, a copy of them learns. So it is with control variates, which are fitted on
    batches of their own; where the gate stays closed nothing is measured, and the result says so.

    Args:
        module: The module to audit.
        datamodule: Its training data.
        candidates: What to compare with; the estimators that ship if not given.
        budget: Seconds to spend; more only if the least number of repetitions or a proposal that
            has yet to learn needs it.
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
    with preserve_global_rng(), warnings.catch_warnings():
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
        # slots learn, and the module's own must not
        draws, control_variate = copy.deepcopy((pl_module.draws, pl_module.control_variate))
        with Candidate("own", draws=draws, control_variate=control_variate).in_place(pl_module):
            run = Measuring(trainer, pl_module, self.candidates, self.budget, self.progress)
            self.result = run.measure()
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
