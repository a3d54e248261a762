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
from lightning_vr.auditing.report import table
from lightning_vr.auditing.run import audit as run_audit
from lightning_vr.callbacks.samples import is_picture, save_picture
from lightning_vr.checkpoints import load_training_weights, read_checkpoint
from lightning_vr.distributed import all_gather_rows
from lightning_vr.module import DiffusionModule
from lightning_vr.sinks import run_folder


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
        found.save(folder)
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
    """Gathers the samples of all ranks and writes them to the run's folder."""

    def __init__(self, num_classes: int | None) -> None:
        self.num_classes = num_classes
        self._samples: list[Tensor] = []
        self._positions: list[Tensor] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._samples.append(outputs)
        self._positions.append(batch["index"])

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        order = all_gather_rows(torch.cat(self._positions)).argsort()
        samples = all_gather_rows(torch.cat(self._samples))[order].float().cpu()
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        names = ["samples.npz"]
        arrays: dict[str, Any] = {"samples": samples.numpy()}
        if self.num_classes is not None:
            arrays["labels"] = np.arange(len(samples)) % self.num_classes
        np.savez(folder / "samples.npz", **arrays)
        if is_picture(tuple(samples.shape[1:])):
            names.append("samples.png")
            save_picture(samples, folder / "samples.png", columns=self.num_classes)
        print(f"{len(samples)} samples in {folder}: {', '.join(names)}")
