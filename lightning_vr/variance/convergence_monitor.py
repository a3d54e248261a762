"""ConvergenceMonitor: how far a network is from its optimum, for a training loop without Lightning.

The measurement is that of ``convergence``. In a loop::

    monitor = ConvergenceMonitor(train, held_out, loss=loss, schedule=DDPMScheduler())
    for step, batch in enumerate(loader):
        monitor.update(step, model)
        ...  # the step, as it was
    print(monitor.summary())
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vr.core.devices import device_of
from lightning_vr.core.rng import generator, preserve_global_rng, seed_global_rng
from lightning_vr.core.types import Clean, Noised
from lightning_vr.core.validation import (
    check_at_least,
    check_finite,
    check_one_per_sample,
    check_samples,
)
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
from lightning_vr.variance.optimum import Population

GivenLossFunction = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""``(model, x0 (B, *), noise (B, *), t (B,)) -> squared error of each sample (B,)``."""


class ConvergenceMonitor:
    """Measures loss, irreducible part and distance from the optimum at each noise level.

    It changes neither the model's weights, gradients and mode nor the global random state.

    Args:
        train: The training samples ``(N, *)``.
        held_out: Samples that are not trained on, or None.
        loss: Squared error of each sample, whatever its weight and what the network predicts.
        schedule: Scales of sample and noise: a schedule, or a scheduler of diffusers.
        timesteps: Density of t; the schedule's usual one if not given.
        every_n_steps: Measure at the first step and at each multiple of this number.
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
        train: Tensor,
        held_out: Tensor | None = None,
        *,
        loss: GivenLossFunction,
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
        check_samples("train", train)
        check_finite("train", train)
        self._train = FixedDraws("train", evenly_spaced(train, samples), times, schedule)
        self._held_out: FixedDraws | None = None
        if held_out is not None:
            check_samples("held_out", held_out)
            check_finite("held_out", held_out)
            clean = evenly_spaced(held_out, samples)
            self._held_out = FixedDraws("held-out", clean, times, schedule)
        self._references, self._size = evenly_spaced(train, max_data), len(train)

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
        population = Population.prepare(moved(self._references, device), self._size)
        return ConvergenceMeasurement(
            self._train, self._held_out, population, losses, self.batch_size, device
        )


def given_losses(loss: GivenLossFunction, model: Any, noised: Noised) -> Tensor:
    """Return what a user's loss gives for each draw ``(B,)``, always with the same randomness.

    Raises:
        ValueError: If it is not one number for each.
    """
    with seed_global_rng(generator("fixed draws", "loss", device=noised.t.device)):
        found = loss(model, noised.x0, noised.noise, noised.t)
    check_one_per_sample("loss", found, len(noised.t))
    return found


def whole_blocks(samples: int) -> int:
    """Return the largest multiple of the number of blocks that is at most ``samples``."""
    return samples // BLOCKS * BLOCKS


def evenly_spaced(x: Tensor, count: int) -> Clean:
    """Return at most ``count`` samples on the CPU, with their positions as indices."""
    count = min(count, len(x))
    at = torch.arange(count) * len(x) // count
    return Clean(x[at.to(x.device)].detach().cpu(), index=at)
