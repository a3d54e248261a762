"""Components of gradient variance of a loss whose times and noise can be drawn again."""

from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_vr.callbacks.gradient_probes import GradientProbe, ProbeResult
from lightning_vr.callbacks.noisy_training import NoisyTraining
from lightning_vr.core.batches import batch_size, take_rows
from lightning_vr.core.distributed import least
from lightning_vr.core.types import Clean
from lightning_vr.variance.gradient_measurement import GradientMeasurement
from lightning_vr.variance.nested_measurement import NestedMeasurement

_PER_SAMPLE_COST = 5.0
"""Cost of a per-sample gradient over that of one draw in a batch, as measured on a U-Net."""


class NestedProbe(GradientProbe):
    """Measures components of a loss whose times and noise can be drawn again.

    Args:
        trainer: The trainer.
        module: The module that it trains.
        training: Its loss.
        samples: Number of samples whose gradients are taken one by one.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, training: NoisyTraining, samples: int
    ) -> None:
        super().__init__(trainer, module)
        self.training = training
        self.gradients = GradientMeasurement(training.loss, self.source, self.groups)
        self.samples = samples
        self.noise_levels = training.noise_levels
        self._measurement: NestedMeasurement | None = None
        self._pair: list[Any] = [None]

    def prepare(self, batch: Any) -> None:
        clean = self._encode(batch, 2)
        self._measurement = NestedMeasurement(self.gradients, clean, self.module.device)
        reason = self._measurement.why_by_differences
        if reason is None:
            self.cost = _PER_SAMPLE_COST * 8 * self.samples / self._least(batch_size(batch))
            rank_zero_info("GradientVariance measures per-sample gradients.")
        else:
            self.cost = 16.0  # two batches, four passes each, for the whole and for a bin
            rank_zero_info(f"GradientVariance measures by differences of batches: {reason}.")

    def pending_batch(self) -> Any:
        return self._pair[-1]

    def restore_pending_batch(self, batch: Any) -> None:
        self._pair = [move_data_to_device(batch, self.module.device)]

    def before_any_batch(self, batch: Any) -> None:
        self._pair = [None] if self._is_per_sample else [self._pair[-1], batch]

    def before_batch(self, batch: Any, batch_idx: int, number: int) -> ProbeResult | None:
        assert self._measurement is not None
        batches = self._batches(batch)
        if batches is None:
            return None
        # what training differentiates is a mean over the batch, of which a row is the B-th part
        rows = batch_size(batch) if self._is_per_sample and self.loss_scale > 1 else 1
        self.gradients.loss_scale = self.loss_scale / rows

        whole = self._measurement.whole(batches, "whole")
        levels = self._measurement.levels(batches, len(self.noise_levels), number, "level")
        device = self.module.device
        return whole.over_ranks(device), {i: x.over_ranks(device) for i, x in levels.items()}

    @property
    def _is_per_sample(self) -> bool:
        return self._measurement is not None and self._measurement.is_per_sample

    def _batches(self, batch: Any) -> list[Clean] | None:
        """Return the batches to measure on, or None if there are not enough samples."""
        if self._is_per_sample:
            size = self._least(min(self.samples, batch_size(batch)))
            return [self._encode(batch, size)] if size > 1 else None
        if self._pair[0] is None:
            return None
        pair = [self._encode(one, batch_size(one)) for one in self._pair]
        size = min(len(clean.x0) for clean in pair)
        return [clean.rows(slice(0, size)) for clean in pair]

    def _least(self, size: int) -> int:
        """Return the smallest of the ranks' sizes: all ranks must leave out what one does."""
        return least(size)

    def _encode(self, batch: Any, count: int) -> Clean:
        return self.training.encode(take_rows(batch, 0, count), self.source("encode"))
