"""Measuring the whole gradient and bins of the noise level, per sample or by differences.

Per-sample gradients need fewer passes and are used where they show the whole variance. Elsewhere
differences of batches are measured (``variance.gradient_measurement``).
"""

from collections.abc import Sequence

import torch

from lightning_vr.core.distributed import least
from lightning_vr.core.types import Clean
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_measurement import GradientMeasurement


class NestedMeasurement:
    """Measures in the one of two ways that fits a loss and its batches, the same on all ranks.

    Args:
        measurement: Takes the gradients.
        clean: Samples of a first batch, to try it on; all ranks must be given some.
        device: The device of the module.
        samples: The smallest number of samples that per-sample gradients are worth taking of.

    Attributes:
        why_by_differences: Why batches are compared, or None if gradients are taken per sample.
    """

    def __init__(
        self,
        measurement: GradientMeasurement,
        clean: Clean,
        device: torch.device,
        samples: int = 2,
    ) -> None:
        self.measurement = measurement
        reason = self._why_by_differences(clean, device, samples)
        # a reason such as too little memory may exist on one rank alone
        is_per_sample = least(reason is None) == 1
        self.why_by_differences = (
            None if is_per_sample else reason or "another rank cannot measure per sample"
        )

    @property
    def is_per_sample(self) -> bool:
        """Whether gradients are taken per sample."""
        return self.why_by_differences is None

    def whole(self, batches: Sequence[Clean], *key: int | str) -> Components:
        """Return components of the whole gradient and of its groups.

        Args:
            batches: Two batches of equal size, or one if gradients are taken per sample.
            *key: Distinguishes the draws of this measurement from others.
        """
        return self._measure(batches, key, 0.0, 1.0)

    def levels(
        self, batches: Sequence[Clean], count: int, number: int, *key: int | str
    ) -> dict[int, Components]:
        """Return components in bins of the noise level, by the number of the bin.

        All bins are measured at once from per-sample gradients of two or more samples for each.
        Otherwise they take turns.

        Args:
            batches: As ``whole`` takes them.
            count: Number of equally likely bins.
            number: How many turns there were before.
            *key: Distinguishes the draws of this measurement from others.
        """
        if self.is_per_sample and len(batches[0].x0) >= 2 * count:
            return dict(enumerate(self.measurement.per_sample_by_level(batches[0], count, *key)))
        level = number % count
        return {level: self._measure(batches, key, level / count, (level + 1) / count)}

    def _measure(
        self, batches: Sequence[Clean], key: tuple[int | str, ...], low: float, high: float
    ) -> Components:
        if self.is_per_sample:
            return self.measurement.per_sample(batches[0], *key, low=low, high=high)
        return self.measurement.by_differences(batches, *key, low=low, high=high)

    def _why_by_differences(self, clean: Clean, device: torch.device, samples: int) -> str | None:
        if least(len(clean.x0)) < samples:
            return f"a batch holds fewer than {samples} samples"
        pair = clean.rows(slice(0, 2))
        if not self.measurement.loss.couples_rows:
            # what a forward pass moves to the device and keeps must be moved outside functorch
            self.measurement.by_differences([pair, pair], "prepare")
        return self.measurement.why_unavailable(clean)
