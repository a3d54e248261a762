"""The samples that ``predict`` draws, gathered from all ranks and written to the run's folder."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_vr.callbacks.pictures import is_picture, save_picture
from lightning_vr.core.distributed import all_gather_numbers, all_gather_rows
from lightning_vr.data.conditions import Conditions
from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.lifecycle.loggers import run_folder

_WIDEST = 100
"""Columns of the widest grid, one for each condition."""


class SampleWriter(Callback):
    """Gathers the samples of all ranks batch by batch and writes samples.npz and samples.png.

    Args:
        conditions: What the samples are conditioned on, cycled over, or None; written beside them.
    """

    def __init__(self, conditions: Conditions | None) -> None:
        self.conditions = conditions
        self._samples: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._empty: list[Tensor] = []
        self._batches_left = 0

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the last ranks may have one batch less than the first
        own = int(sum(trainer.num_predict_batches))
        counts = all_gather_numbers([own])
        self._batches_left = max(count for (count,) in counts)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._empty = [x.new_empty(0, *x.shape[1:]) for x in (outputs, batch["index"])]
        self._gather(trainer, outputs, batch["index"])

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while self._batches_left:
            self._gather(trainer, *self._empty)
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        samples = self._in_order()
        names = ["samples.npz"]
        arrays: dict[str, Any] = {"samples": samples.numpy()}
        if self.conditions is not None:
            rows = self.conditions.rows(torch.arange(len(samples)))
            arrays |= {name: np.asarray(x) for name, x in rows.columns.items()}
            arrays |= {} if rows.labels is None else {"labels": rows.labels.numpy()}
        with replacing(folder / "samples.npz") as file:
            np.savez(file, **arrays)
        if is_picture(tuple(samples.shape[1:])):
            names.append("samples.png")
            count = None if self.conditions is None else len(self.conditions)
            columns = count if count is not None and count <= _WIDEST else None
            save_picture(samples, folder / "samples.png", columns=columns)
        print(f"{len(samples)} samples in {folder}: {', '.join(names)}")

    def _gather(self, trainer: Trainer, samples: Tensor, positions: Tensor) -> None:
        """Add a batch of each rank; all ranks must call this equally often."""
        self._batches_left -= 1
        samples, positions = all_gather_rows(samples), all_gather_rows(positions)
        # many samples fit only into host memory, and only once
        if trainer.is_global_zero:
            self._samples.append(samples.float().cpu())
            self._positions.append(positions.cpu())

    def _in_order(self) -> Tensor:
        """Return all samples in the order of the requests, and free the batches."""
        places = torch.cat(self._positions).argsort().argsort()
        found = torch.empty(len(places), *self._samples[0].shape[1:], dtype=torch.float32)
        for where in reversed(torch.split(places, [len(x) for x in self._samples])):
            found[where] = self._samples.pop()
        self._positions.clear()
        return found
