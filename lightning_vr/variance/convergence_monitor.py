"""ConvergenceMonitor: how far a network is from its optimum, for a training loop without Lightning.

The measurement is that of ``convergence``. In a loop::

    monitor = ConvergenceMonitor(train, held_out, loss=loss, schedule=DDPMScheduler())
    for step, batch in enumerate(loader):
        monitor.update(step, model)
        ...  # the step, as it was
    print(monitor.summary())
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vr.core.devices import device_of
from lightning_vr.core.rng import generator, preserve_global_rng, seed_global_rng
from lightning_vr.core.rows import detached
from lightning_vr.core.types import Clean, Noised
from lightning_vr.core.validation import check_at_least, check_finite, check_samples
from lightning_vr.process.diffusers_schedule import as_schedule
from lightning_vr.process.sampling import evaluating
from lightning_vr.process.timesteps import Density
from lightning_vr.variance.convergence import ConvergenceMeasurement
from lightning_vr.variance.convergence_curves import (
    Floors,
    Record,
    records_from,
    records_state,
)
from lightning_vr.variance.convergence_summary import summarize
from lightning_vr.variance.fixed_draws import BLOCKS, FixedDraws, LevelTimes, moved
from lightning_vr.variance.given_loss import (
    LossFunction,
    given_clean,
    given_loss,
    sees_conditions,
)
from lightning_vr.variance.optimum import Population


class ConvergenceMonitor:
    """Measures loss, irreducible part and distance from the optimum at each noise level.

    It changes neither the model's weights, gradients and mode nor the global random state.

    Args:
        train: The training samples ``(N, *)``, or a ``Clean`` with their labels or conditions.
        held_out: Samples that are not trained on, or None.
        loss: Squared error of each sample, whatever its weight and what the network predicts:
            ``loss(model, x0, noise, t)``, or ``loss(model, x0, noise, t, clean)`` if the network
            sees labels or conditions. Where samples have conditions that nobody shares, the loss
            is measured without its floor.
        schedule: Scales of sample and noise: a schedule, or a scheduler of diffusers.
        timesteps: Density of t; the schedule's usual one if not given.
        every_n_steps: Measure at the first step and at each multiple of this number, however long
            steps are; the callback ``Convergence`` keeps measuring at 2 % of the training time.
        noise_levels: Number of equally likely bins of the noise level.
        samples: Number of draws at each of them, for each set; a multiple of 16 is used.
        max_data: Largest number of training samples, evenly spaced, that the optimum is computed
            from; with fewer than all it is bracketed.
        batch_size: Largest number of draws at a time.

    Attributes:
        records: The validations so far.
        floors: The irreducible losses, from the first validation on.

    Raises:
        ValueError: If a number is out of range or samples are not finite.
    """

    def __init__(
        self,
        train: Tensor | Clean,
        held_out: Tensor | Clean | None = None,
        *,
        loss: LossFunction,
        schedule: Any,
        timesteps: Density | None = None,
        every_n_steps: int = 500,
        noise_levels: int = 12,
        samples: int = 128,
        max_data: int = 10_000,
        batch_size: int = 128,
    ) -> None:
        check_at_least("every_n_steps", every_n_steps, 1)
        check_at_least("noise_levels", noise_levels, 2)
        check_at_least("samples", samples, BLOCKS)
        check_at_least("max_data", max_data, 2)
        check_at_least("batch_size", batch_size, 1)
        self.loss, self.every_n_steps, self.batch_size = loss, every_n_steps, batch_size
        self.records: list[Record] = []
        self.floors: Floors | None = None
        self._measurement: ConvergenceMeasurement | None = None

        schedule = as_schedule(schedule)
        density = timesteps or schedule.default_timesteps()
        times = LevelTimes.stratified(schedule, density, noise_levels, whole_blocks(samples))
        known = self._checked("train", train)
        self._train = FixedDraws("train", evenly_spaced(known, samples), times, schedule)
        self._held_out: FixedDraws | None = None
        if held_out is not None:
            clean = evenly_spaced(self._checked("held_out", held_out), samples)
            self._held_out = FixedDraws("held-out", clean, times, schedule)
        self._references, self._size = evenly_spaced(known, max_data), len(known.x0)

    def update(self, step: int, model: nn.Module) -> bool:
        """Measure if ``step`` is due, and return whether it was.

        Args:
            step: Optimizer steps that the model has made.
            model: The network, or its moving average.
        """
        is_new = not self.records or self.records[-1].step < step
        if step % self.every_n_steps or not is_new:
            return False
        self.measure(step, model)
        return True

    def measure(self, step: int, model: nn.Module) -> Record:
        """Measure whatever the step, and return what was found."""
        device = device_of(model)
        self._train.schedule.to(device)
        with torch.no_grad(), evaluating(model), preserve_global_rng():

            def losses(noised: Noised) -> Tensor:
                return given_losses(self.loss, model, noised)

            if self._measurement is None:
                self._measurement = self._made(losses, device)
                self.floors = self._measurement.floors
            record = self._measurement.measure(step, losses)
        self.records.append(record)
        return record

    def summary(self) -> str:
        """Return what was found, in sentences."""
        if self.floors is None:
            return "Nothing has been measured yet."
        return summarize(self.floors, self.records)

    def state_dict(self) -> dict[str, Any]:
        """Return the validations so far."""
        return records_state(self.records)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from validations of the same data and settings."""
        self.records = records_from(state)

    def _made(
        self, losses: Callable[[Noised], Tensor], device: torch.device
    ) -> ConvergenceMeasurement:
        population: Population | None = None
        if self._references.cond is None or self._references.cond_group is not None:
            population = Population.prepare(moved(self._references, device), self._size)
        return ConvergenceMeasurement(
            self._train, self._held_out, population, losses, self.batch_size, device
        )

    def _checked(self, name: str, samples: Tensor | Clean) -> Clean:
        """Return samples with what the loss sees of their labels and conditions."""
        clean = given_clean(samples)
        check_samples(name, clean.x0)
        check_finite(name, clean.x0)
        return clean if sees_conditions(self.loss) else Clean(clean.x0)


def given_losses(loss: LossFunction, model: Any, noised: Noised) -> Tensor:
    """Return what a user's loss gives for each draw ``(B,)``, always with the same randomness."""
    clean = Clean(noised.x0, noised.group, noised.cond, noised.index, noised.cond_group)
    with seed_global_rng(generator("fixed draws", "loss", device=noised.t.device)):
        return given_loss(loss, model, clean, noised.noise, noised.t)


def whole_blocks(samples: int) -> int:
    """Return the largest multiple of the number of blocks that is at most ``samples``."""
    return samples // BLOCKS * BLOCKS


def evenly_spaced(clean: Clean, count: int) -> Clean:
    """Return at most ``count`` samples on the CPU, with their positions as indices."""
    size = len(clean.x0)
    count = min(count, size)
    at = torch.arange(count) * size // count
    rows = detached(clean.rows(at.to(clean.x0.device)))
    return replace(moved(rows, torch.device("cpu")), index=at)
