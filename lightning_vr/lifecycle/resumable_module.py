"""ResumableModule: what any LightningModule needs to be stopped anywhere and to resume exactly.

* **Resume**: a checkpoint keeps the seed, where the run stands within an epoch and what is due
  there (a row of the log, a validation run, an epoch's end), and gradients within an accumulation
  window (``resuming.py``).
* **Stop**: a signal to one rank stops or saves all of them at the end of the same batch
  (``stopping.py``).
* **Files**: checkpoints and CSV logs are written whole or not at all, and neither a full disk nor
  a logger that raises ends a run (``checkpoint_io.py``, ``csv_logs.py``, ``loggers.py``).
* **Numbers**: an optimizer step that is not finite is refused, or left out on all ranks
  (``finite_guard.py``).

The hooks are the module's and not a callback's: those of callbacks run before ``ModelCheckpoint``,
and what a resumed run makes up for must come last.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_vr.core.distributed import broadcast
from lightning_vr.core.keyed_module import KeyedModule
from lightning_vr.core.rng import set_global_rng
from lightning_vr.core.sharding import is_sharded, whole_weights
from lightning_vr.lifecycle.checkpoint_contents import (
    check_contents,
    check_loops,
    check_optimizer_states,
    check_training_state,
)
from lightning_vr.lifecycle.checkpoint_io import (
    begin_checkpoints,
    finish_checkpoints,
    use_durable_checkpoints,
)
from lightning_vr.lifecycle.csv_logs import keep_csv_logs_whole, reopen_csv_logs
from lightning_vr.lifecycle.epoch_length import (
    check_training_batches,
    check_validation_batches,
    equalize_epoch_length,
)
from lightning_vr.lifecycle.finite_guard import FiniteGuard, OnNonFinite
from lightning_vr.lifecycle.loggers import warn_on_logger_errors
from lightning_vr.lifecycle.own_state import STATE
from lightning_vr.lifecycle.rebuilding import load_module
from lightning_vr.lifecycle.resuming import Resuming
from lightning_vr.lifecycle.similar_state import check_callbacks
from lightning_vr.lifecycle.stopping import CoordinatedStop, is_evaluating
from lightning_vr.lifecycle.strategies import check_strategy
from lightning_vr.lifecycle.wandb_page import define_page
from lightning_vr.lifecycle.weight_averaging import AveragedWeights, is_averaged, load_what_trains

_NEEDED_HOOKS = ("on_fit_start", "on_train_start", "on_train_batch_start")


class ResumableModule(KeyedModule, LightningModule):
    """A LightningModule whose runs stop safely, save durably and resume exactly.

    Derive from it in place of ``LightningModule``. torch's global generator is seeded in each
    training step by the run's seed, the rank and the step, so that dropout and augmentation repeat.
    Data modules of this package resume in mid-epoch; other loaders resume as Lightning has it.

    A subclass that overrides a hook calls ``super()``; ``prepare_training`` needs no such call.

    Attributes:
        seed: The seed of the run: fixed when training starts, and kept in checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resuming = Resuming()
        self._stop = CoordinatedStop()
        self._averages = AveragedWeights()
        self._guard = FiniteGuard("raise")
        self._whole_weights = ExitStack()
        self._hooks_called: set[str] = set()
        self._undo_seeding: Callable[[], None] | None = None

    @property
    def on_nonfinite(self) -> OnNonFinite:
        """What to do where a number is not finite: ``"raise"``, or ``"skip"`` the step."""
        return self._guard.action

    @on_nonfinite.setter
    def on_nonfinite(self, action: OnNonFinite) -> None:
        self._guard = FiniteGuard(action)

    def prepare_training(self) -> None:
        """Prepare what the first step needs; override it. All ranks call it, on their device."""

    def prepare_data(self) -> None:
        """Open the logs of a run that goes on, before the trainer does and deletes their rows."""
        reopen_csv_logs(self.trainer)

    def setup(self, stage: str) -> None:
        """Let checkpoints be read safely, before the trainer reads one, and check the strategy."""
        if stage == "fit":
            check_strategy(self.trainer, self)
        use_durable_checkpoints(self.trainer)

    def on_fit_start(self) -> None:
        """Install run safeguards: durable checkpoints, tolerant loggers, coordinated stopping."""
        self._hooks_called = {"on_fit_start"}
        check_training_batches(self.trainer)
        check_optimizer_states(self.trainer)
        self._resuming.begin(self.trainer)
        self._averages.watch(self.trainer)
        self._guard.begin()
        self._stop.begin_fit(self.trainer)
        begin_checkpoints(self.trainer)
        keep_csv_logs_whole(self.trainer)
        warn_on_logger_errors(self.trainer)

    def on_train_start(self) -> None:
        """Fix the seed of the run, prepare training, and go on from the checkpoint's position."""
        self._hooks_called.add("on_train_start")
        if self.seed is None:
            self.seed = int(broadcast(torch.tensor(self.run_seed, device=self.device)))
        equalize_epoch_length(self.trainer)
        check_validation_batches(self.trainer)
        define_page(self.trainer)
        self._resuming.restore_gradients(self)
        self._resuming.begin_training(self.trainer)
        self.prepare_training()
        self._resuming.restart(self.trainer)

    def on_fit_end(self) -> None:
        """Log pending metrics of a finished run, and raise if what was trained is not kept.

        Raises:
            ValueError: If the last checkpoint could not be written, or a weight is not finite.
        """
        self._hooks_called = set()
        check_training_batches(self.trainer)
        if self._resuming.is_due:
            self._resuming.end(self.trainer)
            self._averages.keep(self.trainer, self)
        finish_checkpoints(self.trainer)
        self._guard.check_end(self.trainer, self)

    def on_train_epoch_start(self) -> None:
        """Look at the lengths of loaders that were made anew."""
        if self.trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            equalize_epoch_length(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin a micro-step with keyed randomness and a clean record."""
        self._hooks_called.add("on_train_batch_start")
        self._check_hooks_called()
        micro_step = batch_idx % self.trainer.accumulate_grad_batches
        if micro_step == 0:
            self._guard.begin_step()
        self._resuming.begin_batch(self)
        source = self.generator("global", self.global_step, micro_step)
        self._undo_seeding = set_global_rng(source)

    def on_before_backward(self, loss: Tensor) -> None:
        """Note that gradients are about to change, and whether the loss is finite."""
        self._check_hooks_called()
        if self.automatic_optimization:  # else more forward passes may follow
            self._restore_global_rng()
        self._resuming.marks.has_backward_begun = True
        self._guard.add_loss(loss)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Raise, or leave the step out, if a number is not finite."""
        if not self._guard.guard(self.trainer, self, optimizer):
            self.log("train/skipped_steps", float(self._guard.skipped))
        self._resuming.marks.is_stepping = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Restore the global generators, and stop here if any rank was asked to."""
        self._resuming.end_batch(self.trainer)
        self._restore_global_rng()
        self._stop.synchronize(self.trainer)

    def on_validation_epoch_end(self) -> None:
        """Stop after the validation run if any rank was asked to."""
        self._stop.synchronize(self.trainer)

    def on_validation_end(self) -> None:
        """Note that the validation run has ended."""
        self._resuming.marks.has_validated = not self.trainer.sanity_checking
        self._whole_weights.close()

    def on_test_end(self) -> None:
        """Shard weights again that were gathered."""
        self._whole_weights.close()

    on_predict_end = on_test_end

    def on_train_epoch_end(self) -> None:
        """Raise if training makes no progress."""
        self._resuming.end_epoch(self)

    def on_validation_start(self) -> None:
        """Install a handler of signals and gather weights, if this is no part of a fit."""
        if is_evaluating(self.trainer):
            self._stop.begin_evaluation(self.trainer)
            if is_sharded(self):  # ranks may have different numbers of batches
                self._whole_weights.enter_context(whole_weights(self))

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_validation_batch_end(self, *args: Any) -> None:
        """Stop here if any rank was asked to, and this is no part of a fit."""
        self.stop_evaluation_if_asked()

    def on_test_batch_end(self, *args: Any) -> None:
        """Stop here if any rank was asked to."""
        self.stop_evaluation_if_asked()

    def on_predict_batch_end(self, *args: Any) -> None:
        """Stop here if any rank was asked to."""
        self.stop_evaluation_if_asked()

    def stop_evaluation_if_asked(self) -> None:
        """End validate, test or predict by SIGTERMException if any rank was asked to."""
        if self._trainer is not None:
            self._stop.end_evaluation_if_asked(self._trainer)

    def stop_if_asked(self) -> None:
        """End what takes long by SIGTERMException if any rank was asked to; all ranks call it."""
        self._stop.synchronize(self.trainer)
        if self.trainer.received_sigterm:
            raise SIGTERMException

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed and gradients that wait, so that a resumed run repeats."""
        state = checkpoint.setdefault(STATE, {})
        state["seed"] = self.run_seed if self._is_fitting else self.seed
        if self._is_fitting or self._has_fitted:
            self._averages.complete(self.trainer, self, checkpoint)
            state |= self._resuming.state(self, checkpoint)
            state |= {"is_averaged": is_averaged(self.trainer), "skipped": self._guard.count()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what ``on_save_checkpoint`` kept, to resume a fit.

        Raises:
            ValueError: If the checkpoint is damaged.
        """
        check_contents(checkpoint, self._ckpt_path)
        state = checkpoint.get(STATE, {})
        if self._is_fitting:
            load_what_trains(self.trainer, checkpoint)
            check_training_state(checkpoint, self._ckpt_path)
            check_loops(self.trainer, checkpoint)
            check_callbacks(self.trainer, checkpoint)
            self.seed = state.get("seed")
            self._resuming.load(self.trainer, state, checkpoint)
            self._guard.skipped = state.get("skipped", 0)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        strict: bool | None = None,
        *,
        trust: Sequence[str] = (),
        **kwargs: Any,
    ) -> Self:
        """Rebuild a trained module, of whichever subclass wrote the checkpoint.

        A checkpoint is data from a stranger: only classes of this package, torch, diffusers and
        Lightning are built from it, those of modules that are imported, and of ``trust``.

        Args:
            checkpoint_path: The checkpoint file.
            map_location: Where to load the weights; their own device if not given.
            strict: Whether the names of all weights must match.
            trust: Further packages whose classes may be imported and built.
            **kwargs: Constructor arguments in place of the checkpoint's.

        Raises:
            ValueError: If the subclass is not imported, if an argument was an object that no
                configuration can rebuild and is not given again, if an argument names what may not
                be built, or if the weights do not fit.
        """
        return load_module(cls, checkpoint_path, map_location, strict, kwargs, trust)

    def _check_hooks_called(self) -> None:
        """Raise if a subclass has overridden a hook that a run needs without ``super()``."""
        for hook in _NEEDED_HOOKS:
            if hook not in self._hooks_called:
                raise MisconfigurationException(
                    f"`{type(self).__name__}.{hook}` must call `super().{hook}(...)`, which sets "
                    f"seeds and prepares the run, but does not: call it first, or override "
                    f"`prepare_training` instead."
                )

    @property
    def _has_fitted(self) -> bool:
        """Whether the trainer has trained, and runs something else now."""
        return self._trainer is not None and self._trainer.fit_loop.total_batch_idx >= 0

    def _restore_global_rng(self) -> None:
        if self._undo_seeding is not None:
            self._undo_seeding()
        self._undo_seeding = None

    @property
    def _ckpt_path(self) -> Any:
        return "given" if self._trainer is None else self._trainer.ckpt_path

    @property
    def _is_fitting(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
