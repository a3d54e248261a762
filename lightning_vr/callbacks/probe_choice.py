"""Which probe measures the gradient variance of a run, and which runs none can measure."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_vr.callbacks.gradient_probes import GradientProbe
from lightning_vr.callbacks.half_batch_probe import HalfBatchProbe
from lightning_vr.callbacks.micro_batch_probe import MicroBatchProbe
from lightning_vr.callbacks.nested_probe import diffusion_probe, given_probe
from lightning_vr.process.schedules import Schedule
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.noisy_losses import LossFunction


def check_measurable(
    trainer: Trainer,
    module: LightningModule,
    loss: LossFunction | None,
    schedule: Schedule | None,
) -> None:
    """Raise if the gradient cannot be measured with this trainer and module.

    Raises:
        MisconfigurationException: If gradients are not whole on each rank, the schedule of ``loss``
            is missing, or it is unknown which gradient to measure.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy) and type(strategy) is not DDPStrategy:
        raise MisconfigurationException(
            f"GradientVariance needs whole gradients on each rank, which "
            f"{type(strategy).__name__} does not keep: train with one device or DDP."
        )
    if loss is not None and schedule is None:
        raise MisconfigurationException(
            "GradientVariance needs the `schedule` that `loss` trains with: pass it, as in "
            "GradientVariance(loss=..., schedule=VP())."
        )
    is_nested = loss is not None or isinstance(module, DiffusionModule)
    if not is_nested and not module.automatic_optimization:
        raise MisconfigurationException(
            f"GradientVariance cannot know which gradient to measure on a "
            f"{type(module).__name__} with manual optimization: pass `loss`, a function "
            f"(module, x0, noise, t) -> loss of each sample, and its `schedule`."
        )


def choose_probe(
    trainer: Trainer,
    module: LightningModule,
    loss: LossFunction | None,
    schedule: Schedule | None,
    clean: Any,
    **bins: int,
) -> GradientProbe:
    """Return the probe that finds out most about the gradient.

    Args:
        trainer: A trainer that is fitting.
        module: The module that it trains.
        loss: Loss of each sample, of a module that is no DiffusionModule.
        schedule: The schedule that ``loss`` trains with.
        clean: A function from a batch of such a module to clean samples.
        **bins: ``samples`` and ``noise_levels`` of GradientVariance.
    """
    if loss is not None:
        assert schedule is not None
        return given_probe(trainer, module, loss, schedule, clean, **bins)
    if isinstance(module, DiffusionModule):
        return diffusion_probe(trainer, module, **bins)
    if trainer.accumulate_grad_batches * trainer.world_size > 1:
        return MicroBatchProbe(trainer, module)
    return HalfBatchProbe(trainer, module)
