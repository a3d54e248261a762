"""What a run needs of its trainer's strategy: weights whole or sharded as ours are, and float64."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _NormBase

from lightning_vr.core.devices import without_compiler
from lightning_vr.core.sharding import is_sharded
from lightning_vr.lifecycle.ema import EMA
from lightning_vr.lifecycle.precision import loss_scaler
from lightning_vr.lifecycle.sharded_strategy import ShardedStrategy
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of


def check_strategy(trainer: Trainer, module: LightningModule) -> None:
    """Raise if weights are sharded otherwise, the module is compiled, or there is no float64.

    Raises:
        ValueError: Naming the argument of the trainer or of ``fit``.
    """
    strategy = trainer.strategy
    is_ours = isinstance(strategy, ShardedStrategy)
    shards = isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)) and not is_ours
    if shards or getattr(strategy, "zero_stage_3", False):
        raise ValueError(
            f"`strategy` must leave all weights on each rank, as 'ddp' does, or be 'sharded', got "
            f"{type(strategy).__name__}, which shards them: use 'sharded', 'ddp', or one device."
        )
    if is_ours:
        _check_sharded(trainer, module)
    elif is_sharded(module):
        raise ValueError(
            f"`model` must have its weights whole with {type(strategy).__name__}, got ones that an "
            f"earlier fit has sharded: save a checkpoint, and use what load_from_checkpoint makes "
            f"of it."
        )
    # seen in Lightning 2.6; a test compiles a module both ways
    if module._compiler_ctx is not None or module._compiled_call_impl is not None:
        raise ValueError(
            f"`model` must not be compiled as a whole, as its steps log and draw by keys, got a "
            f"compiled {type(module).__name__}: compile the network, as in "
            f"DiffusionModule(network, compile_network=True)."
        )
    if strategy.root_device.type == "mps":
        raise ValueError(
            "`accelerator` must have float64, in which times are drawn, got 'mps': train with "
            "--trainer.accelerator cpu, or on another device."
        )


def check_alternating_steps(trainer: Trainer) -> None:
    """Raise if ranks would wait for gradients of parameters that a backward pass does not reach.

    Raises:
        ValueError: Naming the strategy to use.
    """
    strategy = trainer.strategy
    # seen in Lightning 2.6; a test trains on two ranks both ways
    if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise ValueError(
            "`strategy` must look for parameters that a backward pass does not reach, as each of "
            "the two networks is trained in turn, got one that does not: use "
            "'ddp_find_unused_parameters_true'."
        )


def _check_sharded(trainer: Trainer, module: LightningModule) -> None:
    """Raise if a callback copies the module, or a part of it cannot be sharded.

    Raises:
        ValueError: With the callback or the part.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, WeightAveraging) and not isinstance(callback, EMA):
            raise ValueError(
                f"`callbacks` must not hold {type(callback).__name__} with the strategy 'sharded', "
                f"as it copies the whole module: use lightning_vr.EMA."
            )
    if loss_scaler(trainer) is not None:
        raise ValueError(
            "`precision` must need no loss scale with the strategy 'sharded', whose ranks see "
            "other overflows, got '16-mixed': use 'bf16-mixed'."
        )
    for name, part in module.named_modules():
        if isinstance(part, OptimizedModule):
            raise ValueError(
                f"`{name}` must be compiled in place with the strategy 'sharded', got a wrapper of "
                f"torch.compile around a {type(without_compiler(part)).__name__}: give it as it is "
                f"with compile_network=True, or call its `compile()`."
            )
        if isinstance(part, _NormBase) and part.track_running_stats:
            raise ValueError(
                f"`{name}` must keep no statistics of batches with the strategy 'sharded', whose "
                f"ranks would keep different ones, got a {type(part).__name__}: use group "
                f"normalisation, or 'ddp'."
            )
