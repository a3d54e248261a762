"""Which probe measures the gradient variance of a run, and which runs none can measure."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_vr.callbacks.given_training import GivenTraining
from lightning_vr.callbacks.gradient_probes import GradientProbe
from lightning_vr.callbacks.half_batch_probe import HalfBatchProbe
from lightning_vr.callbacks.micro_batch_probe import MicroBatchProbe
from lightning_vr.callbacks.nested_probe import NestedProbe
from lightning_vr.callbacks.noisy_training import noisy_training
from lightning_vr.lifecycle.sharded_strategy import ShardedStrategy
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.module import DiffusionModule


def check_strategy(trainer: Trainer, callback: str) -> None:
    """Raise if gradients are not whole on each rank.

    Raises:
        MisconfigurationException: With the strategy, and the name of the callback.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy) and type(strategy) is not DDPStrategy:
        raise MisconfigurationException(
            f"{callback} needs whole gradients on each rank, which "
            f"{type(strategy).__name__} does not keep: train with one device or DDP."
        )


def check_measurable(trainer: Trainer, module: LightningModule, given: GivenTraining) -> None:
    """Raise if GradientVariance cannot measure with this trainer and module.

    Raises:
        MisconfigurationException: If gradients are not whole on each rank, what is given is not
            enough, or it is unknown which gradient to measure.
    """
    is_nested = given.loss is not None or isinstance(module, DiffusionModule)
    if not (is_nested and isinstance(trainer.strategy, ShardedStrategy)):
        check_strategy(trainer, "GradientVariance")
    given.check("GradientVariance")
    is_known = is_nested or isinstance(module, EstimatorModule)
    if not is_known and not module.automatic_optimization:
        raise MisconfigurationException(
            f"GradientVariance cannot know which gradient to measure on a "
            f"{type(module).__name__} with manual optimization: pass `loss`, a function "
            f"(module, x0, noise, t) -> loss of each sample, and its `schedule`."
        )


def choose_probe(
    trainer: Trainer,
    module: LightningModule,
    given: GivenTraining,
    *,
    samples: int,
    noise_levels: int,
) -> GradientProbe:
    """Return the probe that finds out most about the gradient.

    Args:
        trainer: A trainer that is fitting.
        module: The module that it trains.
        given: What the user says of a loss.
        samples: Number of samples whose gradients are taken one by one.
        noise_levels: Number of equally likely bins of the noise level.
    """
    training = noisy_training(trainer, module, given, noise_levels)
    if training is not None:
        return NestedProbe(trainer, module, training, samples)
    if trainer.accumulate_grad_batches * trainer.world_size > 1:
        return MicroBatchProbe(trainer, module)
    return HalfBatchProbe(trainer, module)
