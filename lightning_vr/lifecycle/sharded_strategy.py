"""ShardedStrategy: Lightning's ``ModelParallelStrategy`` for FSDP2, with exact resume.

Lightning's own restores weights and optimizer states around the hooks of module and callbacks, so
that what these keep of a run is lost, and writes its folders in place. Here a checkpoint goes the
way that it goes under DDP. Methods of Lightning are as seen in version 2.6.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_vr.core.distributed import gather_objects, ranks_save_together
from lightning_vr.core.sharding import placed_like, shard
from lightning_vr.core.validation import check_at_least
from lightning_vr.lifecycle.checkpoint_io import DurableCheckpointIO
from lightning_vr.lifecycle.loggers import is_training
from lightning_vr.lifecycle.nonfinite_cause import first_broken_weight
from lightning_vr.lifecycle.saved_parameters import saved_parameters
from lightning_vr.lifecycle.sharded_checkpoints import (
    gathered,
    is_sharded_folder,
    load_folder,
    save_folder,
)


class ShardedStrategy(ModelParallelStrategy):
    """Shards weights, gradients and optimizer states over all ranks, block by block (FSDP2).

    It takes any module whose trained parameters are in children that are called through
    ``forward``. Weights start as rank 0 has them, and after each step are those of DDP but for
    rounding. ``Trainer(strategy="sharded")`` is short for it::

        Trainer(strategy=ShardedStrategy(save_distributed_checkpoint=True), devices=8)

    Args:
        block_size: Least number of parameters of a part that is gathered by itself.
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each rank writes its
            rows, rather than one file that rank 0 writes.
        **options: ``process_group_backend`` and ``timeout`` of ``ModelParallelStrategy``.
    """

    def __init__(
        self,
        block_size: int = 1_000_000,
        save_distributed_checkpoint: bool = False,
        **options: Any,
    ) -> None:
        check_at_least("block_size", block_size, 1)
        # all devices of all nodes hold other rows; the second size is of tensor parallelism
        super().__init__(1, 1, save_distributed_checkpoint, **options)
        self.block_size = block_size

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are restored before the first hook of a fit, as under DDP."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning restores the optimizers, by ``load_optimizer_state_dict``."""
        return True

    def setup_environment(self) -> None:
        """Start the ranks, all of which share the weights."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the module, and make its optimizers."""
        self._shard()
        # that of ModelParallelStrategy wants `configure_model`, in which users shard
        ParallelStrategy.setup(self, trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights, each rank its rows."""
        return self._module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer, each rank its rows."""
        return ParallelStrategy.optimizer_state(self, optimizer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, whole or not at all; all ranks call it."""
        if not ranks_save_together():
            rank_zero_warn(
                f"The checkpoint {filepath} is not written, as a rank that fails alone has only "
                f"its part of the weights: earlier checkpoints are kept."
            )
            return
        path, io = self.broadcast(filepath), self.checkpoint_io
        if self._save_distributed_checkpoint:
            if storage_options is not None:
                raise TypeError("`storage_options` must be None for a folder: it is a local one.")
            self._attempt(lambda: save_folder(checkpoint, Path(path)), path)
            return
        whole = gathered(checkpoint)
        if isinstance(io, DurableCheckpointIO):
            self._attempt(lambda: io.put(whole, path, storage_options), path, on_rank_zero=True)
        else:
            ParallelStrategy.save_checkpoint(self, whole, path, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, of a folder the rows that this rank keeps."""
        path = self.broadcast(checkpoint_path)
        self._shard()
        if is_sharded_folder(path):
            return load_folder(Path(path), self.device_mesh["data_parallel"])
        return ParallelStrategy.load_checkpoint(self, path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights, whole or sharded."""
        own = saved_parameters(self._module)
        weights = {
            name: placed_like(x, own[name]) if name in own else x
            for name, x in checkpoint["state_dict"].items()
        }
        self._module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of optimizers, whole or sharded."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_placed(optimizer, state))

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _shard(self) -> None:
        self.model_to_device()
        shard(self._module, self.device_mesh["data_parallel"], self.block_size)

    def _attempt(self, write: Callable[[], None], path: Any, *, on_rank_zero: bool = False) -> None:
        """Write a checkpoint whose weights are finite on all ranks, or warn where that fails."""
        io, broken = self.checkpoint_io, None
        if is_training(self._module.trainer):
            found = gather_objects(first_broken_weight(self._module))
            broken = next((name for name in found if name is not None), None)
        if on_rank_zero and not self.is_global_zero:
            return
        if isinstance(io, DurableCheckpointIO):
            io.attempt(write, path, broken)
        else:
            write()


def _placed(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state whose tensors are sharded as the optimizer's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    own = dict(zip(numbers, parameters, strict=True))

    def place(value: Any, parameter: Tensor) -> Any:
        is_like = isinstance(value, Tensor) and value.shape == parameter.shape
        return placed_like(value, parameter) if is_like else value

    placed = {
        number: {name: place(value, own[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": placed}


StrategyRegistry.register(
    "sharded", ShardedStrategy, description="FSDP2 with exact resume, of lightning_vr"
)
