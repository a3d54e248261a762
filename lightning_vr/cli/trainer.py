"""``predict`` and ``audit``: what Lightning's trainer does not do by itself."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_vr.auditing.candidates import read_candidates
from lightning_vr.auditing.report import save, table
from lightning_vr.auditing.run import audit as run_audit
from lightning_vr.callbacks.pictures import is_picture, save_picture
from lightning_vr.core.distributed import all_gather_numbers, all_gather_rows
from lightning_vr.lifecycle.checkpoints import load_training_weights, read_checkpoint
from lightning_vr.lifecycle.loggers import run_folder
from lightning_vr.training.module import DiffusionModule


class VRTrainer(Trainer):
    """Lightning's trainer, but ``predict`` draws samples, and ``audit`` compares estimators."""

    def audit(
        self,
        model: DiffusionModule,
        datamodule: LightningDataModule,
        candidates: str | Path | None = None,
        budget: PositiveFloat = 120.0,
        ckpt_path: str | Path | None = None,
    ) -> None:
        """Measure what each estimator would save per unit of compute, and advise.

        Writes audit.json, audit.md and audit.png to the run's folder.

        Args:
            model: A module.
            datamodule: Its training data.
            candidates: A YAML file with a list of candidates, each with a name and the slots
                (draws, target, control_variate) that it fills; what ships if not given.
            budget: Seconds to spend; more where three repetitions of each candidate need them.
            ckpt_path: The checkpoint whose weights to audit: a file, or 'last' for that of the
                newest run.
        """
        if ckpt_path is not None:
            load_training_weights(model, read_checkpoint(ckpt_path))
        given = None if candidates is None else read_candidates(candidates)
        found = run_audit(model, datamodule, given, budget=budget, trainer=self)
        folder = run_folder(self)
        if not self.is_global_zero:
            return
        save(found, folder)
        console = Console()
        console.print(table(found))
        console.print(found.advice, style="bold")
        console.print(found.config, highlight=False)
        print(f"The audit is in {folder}: audit.json, audit.md, audit.png")

    def predict(  # type: ignore[override]
        self,
        model: DiffusionModule,
        datamodule: LightningDataModule | None = None,
        num_samples: PositiveInt = 100,
        batch_size: PositiveInt = 256,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Draw samples and write them to the run's folder, as samples.npz and samples.png.

        Args:
            model: A module; the weights come from ``ckpt_path``.
            datamodule: Ignored.
            num_samples: How many; classes are cycled over.
            batch_size: How many at a time, on each process.
            ckpt_path: The checkpoint to draw from: a file, or 'last' for that of the newest run.
            weights_only: As ``torch.load`` takes it.

        Raises:
            ValueError: If the module is not trained, or if there are fewer samples than processes.
        """
        if ckpt_path is None and model.sample_shape is None:
            raise ValueError(
                "Argument `ckpt_path` is missing: predict draws from a trained module."
            )
        if num_samples < self.world_size:
            raise ValueError(
                f"Argument `num_samples` expected to be at least {self.world_size}, the number of "
                f"processes, but got {num_samples}."
            )
        classes = model.num_classes or 1
        requests: Any = [
            {"index": torch.tensor(i), "label": torch.tensor(i % classes)}
            for i in range(num_samples)
        ]
        loader: DataLoader[Any] = DataLoader(requests, batch_size)
        self.callbacks.append(_SampleWriter(model.num_classes))  # type: ignore[attr-defined]
        # requests cost nothing to load
        warnings.filterwarnings("ignore", "The 'predict_dataloader' does not have many workers")
        super().predict(
            model,
            loader,
            return_predictions=False,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
        )


class _SampleWriter(Callback):
    """Gathers the samples of all ranks, batch by batch, and writes them to the run's folder."""

    def __init__(self, num_classes: int | None) -> None:
        self.num_classes = num_classes
        self._samples: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._nothing: list[Tensor] = []
        self._batches_left = 0

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the last ranks may have a batch less than the first
        own = int(sum(trainer.num_predict_batches))
        counts = all_gather_numbers([own], pl_module.device)
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
        self._nothing = [x.new_empty(0, *x.shape[1:]) for x in (outputs, batch["index"])]
        self._gather(trainer, outputs, batch["index"])

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while self._batches_left:
            self._gather(trainer, *self._nothing)
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        samples = self._in_order()
        names = ["samples.npz"]
        arrays: dict[str, Any] = {"samples": samples.numpy()}
        if self.num_classes is not None:
            arrays["labels"] = np.arange(len(samples)) % self.num_classes
        np.savez(folder / "samples.npz", **arrays)
        if is_picture(tuple(samples.shape[1:])):
            names.append("samples.png")
            save_picture(samples, folder / "samples.png", columns=self.num_classes)
        print(f"{len(samples)} samples in {folder}: {', '.join(names)}")

    def _gather(self, trainer: Trainer, samples: Tensor, positions: Tensor) -> None:
        """Take in a batch of each rank; all ranks must call it equally often."""
        self._batches_left -= 1
        samples, positions = all_gather_rows(samples), all_gather_rows(positions)
        # many samples fit into the memory of a host alone, and that once
        if trainer.is_global_zero:
            self._samples.append(samples.float().cpu())
            self._positions.append(positions.cpu())

    def _in_order(self) -> Tensor:
        """Return all samples in the order of the requests, and let go of the batches."""
        places = torch.cat(self._positions).argsort().argsort()
        found = torch.empty(len(places), *self._samples[0].shape[1:], dtype=torch.float32)
        for where in reversed(torch.split(places, [len(x) for x in self._samples])):
            found[where] = self._samples.pop()
        self._positions.clear()
        return found
