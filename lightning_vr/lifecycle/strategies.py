"""What a run needs of its trainer's strategy: whole weights on each rank, and float64."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy


def check_strategy(trainer: Trainer, module: LightningModule) -> None:
    """Raise if weights are sharded, the whole module is compiled, or the device has no float64.

    Raises:
        ValueError: Naming the argument of the trainer or of ``fit``.
    """
    strategy = trainer.strategy
    is_sharded = isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))
    if is_sharded or getattr(strategy, "zero_stage_3", False):
        raise ValueError(
            f"`strategy` must leave all weights on each rank, as 'ddp' does, got "
            f"{type(strategy).__name__}, which shards them: use 'ddp', or one device."
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
