"""How a module that is not a DiffusionModule is trained, as the user tells a callback."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_vr.core.devices import device_of
from lightning_vr.core.validation import check_functions
from lightning_vr.process.diffusers_schedule import as_schedule
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.timesteps import Density, Uniform
from lightning_vr.training.noisy_losses import Corruption, GivenLoss, Precision
from lightning_vr.variance.given_loss import LossFunction
from lightning_vr.variance.gradient_statistics import NOISE_LEVEL


@dataclass(frozen=True)
class GivenTraining:
    """What a user says of a training loss.

    Attributes:
        loss: ``(module, x0, noise, t) -> loss of each sample (B,)``, or with ``clean`` as its last
            argument (``variance.given_loss``), or None.
        schedule: The schedule that ``loss`` trains with, or None.
        clean: A function from a batch to clean samples ``(B, *)``, or None.
        draw: ``(x0, t, generator) -> corruption (B, *)``, which ``loss`` gets as ``noise``; None
            for standard normal noise.
        timesteps: Density of t; None for that of the schedule, or uniform on (0, 1) without one.
    """

    loss: LossFunction | None = None
    schedule: Any = None
    clean: Callable[[Any], Any] | None = None
    draw: Corruption | None = None
    timesteps: Density | None = None

    def __post_init__(self) -> None:
        check_functions(loss=self.loss, clean=self.clean, draw=self.draw)
        if self.schedule is not None:
            object.__setattr__(self, "schedule", as_schedule(self.schedule))

    def key(self) -> dict[str, str | None]:
        """Return what tells instances apart that measure differently."""
        return {
            "loss": _name(self.loss),
            "schedule": None if self.schedule is None else type(self.schedule).__name__,
            "clean": _name(self.clean),
            "draw": _name(self.draw),
            "timesteps": None if self.timesteps is None else type(self.timesteps).__name__,
        }

    def check(self, callback: str) -> None:
        """Raise if a part is missing.

        Args:
            callback: Name of the callback that was given it.

        Raises:
            MisconfigurationException: If ``loss`` is missing while ``draw`` or ``timesteps`` is
                given, or if it is unknown which times ``loss`` is trained at.
        """
        if self.loss is None and (self.draw is not None or self.timesteps is not None):
            raise MisconfigurationException(
                f"{callback} needs the `loss` that `draw` and `timesteps` belong to: pass it, a "
                f"function (module, x0, noise, t) -> loss of each sample."
            )
        times = (self.schedule, self.draw, self.timesteps)
        if self.loss is not None and all(each is None for each in times):
            raise MisconfigurationException(
                f"{callback} needs the `schedule` that `loss` trains with: pass it, as in "
                f"{callback}(loss=..., schedule=VP()), or `draw` for a corruption that is no "
                f"Gaussian noise."
            )

    @property
    def density(self) -> Density:
        """The density of t."""
        if self.timesteps is not None:
            return self.timesteps
        return Uniform() if self.schedule is None else self.schedule.default_timesteps()

    def axis(self, times: str) -> str:
        """Return what bins are bins of: noise levels, or without a schedule ``times``."""
        return NOISE_LEVEL if self.loss is None or self.schedule is not None else times

    def noise_levels(self, count: int) -> Tensor:
        """Return the noise level in the middle of equally likely bins, the time without a schedule.

        Args:
            count: Number of bins.
        """
        schedule: Schedule | None = self.schedule
        if schedule is None:
            return self.density.middles(count, device_of(self.density))
        return schedule.noise_level(self.density.middles(count, device_of(schedule)))

    def noisy_loss(self, module: LightningModule, precision: Precision) -> GivenLoss:
        """Return the loss of a module, which must be given, in the trainer's precision."""
        assert self.loss is not None
        return GivenLoss(module, self.loss, self.density, precision, self.draw)


def _name(function: Any) -> str | None:
    return getattr(function, "__qualname__", None)
