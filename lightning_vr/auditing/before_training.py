"""Measuring where training would begin: a trainer sets all up, and ends before the first step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_vr.core.rng import preserve_global_rng
from lightning_vr.lifecycle.quiet_trainer import quiet_trainer
from lightning_vr.lifecycle.sharded_strategy import ShardedStrategy
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of, using_callbacks
from lightning_vr.training.estimator_module import EstimatorModule

_MODULE_STATE = ("seed", "estimate", "sample_shape")
"""What a trainer sets on a module before its first step."""

_Module = TypeVar("_Module", bound=EstimatorModule)
_Result = TypeVar("_Result")


def measure_before_training(
    measure: Callable[[Trainer, _Module], _Result],
    module: _Module,
    datamodule: LightningDataModule,
    trainer: Trainer | None,
) -> _Result:
    """Return what is measured where training would begin.

    Neither the module nor the global random state is changed, also if the measurement fails, as
    long as ``measure`` leaves the module as it was.

    Args:
        measure: Measures with a trainer that is about to train the module; called on all ranks.
        module: The module.
        datamodule: Its training data.
        trainer: Gives device, precision and ranks; a new one on this machine if None. Its callbacks
            are not run, and it cannot be used again.

    Raises:
        MisconfigurationException: If the trainer starts its processes by fork or spawn, or shards
            weights.
    """
    callback = _Measuring(lambda trainer: measure(trainer, module))
    with quiet_trainer():
        if trainer is None:
            trainer = Trainer(
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise MisconfigurationException(
                "A measurement cannot return a result from processes that the trainer forks or "
                "spawns: use one device, or strategy='ddp' in a script of its own."
            )
        if isinstance(trainer.strategy, ShardedStrategy):
            raise MisconfigurationException(
                "`strategy` must leave all weights on each rank to be measured, got 'sharded': use "
                "'auto', or 'ddp' on several devices, whatever the run is trained with."
            )
        state = [name for name in _MODULE_STATE if hasattr(module, name)]
        with (
            _restored(module, *state),
            _running_alone(trainer, callback),
            preserve_global_rng(),
        ):
            trainer.fit(module, datamodule=datamodule)
    return callback.results[0]


class _Measuring(Callback, Generic[_Result]):
    """Measures where training would begin, and ends training before the first step."""

    def __init__(self, measure: Callable[[Trainer], _Result]) -> None:
        self.measure = measure
        self.results: list[_Result] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results.append(self.measure(trainer))
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step


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
def _running_alone(trainer: Trainer, callback: Callback) -> Iterator[None]:
    """Let a trainer run the callback alone, in one epoch; put its settings back afterwards."""
    savers = [each for each in callbacks_of(trainer) if isinstance(each, SaveConfigCallback)]
    with (
        using_callbacks(trainer, [*savers, callback]),
        _restored(trainer, "limit_val_batches"),
        _restored(trainer.fit_loop, "max_epochs"),
        _restored(trainer.fit_loop.epoch_loop, "max_steps"),
    ):
        trainer.limit_val_batches = 0
        trainer.fit_loop.max_epochs = 1
        yield
