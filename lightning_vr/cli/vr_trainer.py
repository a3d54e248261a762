"""Lightning's trainer that evaluates, draws samples, compares estimators, caches, exports."""

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_vr.auditing.candidates import read_candidates
from lightning_vr.auditing.error_budget_report import save as save_error_budget
from lightning_vr.auditing.error_budget_report import table as error_budget_table
from lightning_vr.auditing.report import RECOMMENDED, not_measured, save, table
from lightning_vr.auditing.run import audit as run_audit
from lightning_vr.auditing.sampling_errors import error_budget as run_error_budget
from lightning_vr.callbacks.evaluation import Evaluation
from lightning_vr.callbacks.frechet_distance import FrechetDistance
from lightning_vr.cli.sample_writer import SampleWriter
from lightning_vr.core.validation import check_at_least
from lightning_vr.data.conditions import Conditions, ConditionsSource
from lightning_vr.lifecycle.checkpoints import (
    load_training_weights,
    load_weights,
    read_checkpoint,
)
from lightning_vr.lifecycle.loggers import run_folder
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of, using_callbacks
from lightning_vr.pipelines.export_folder import ExportFormat
from lightning_vr.pipelines.export_folder import export as export_model
from lightning_vr.pipelines.provenance import Provenance
from lightning_vr.process.sampling import Sampler
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.latent_cache import CacheDtype, cache_latents
from lightning_vr.training.latents import LatentDiffusionModule
from lightning_vr.training.module import DiffusionModule


class VRTrainer(Trainer):
    """A ``Trainer`` with commands for samples, evaluation, estimators, caches and export."""

    def cache(
        self,
        model: LatentDiffusionModule,
        datamodule: LightningDataModule,
        path: str | Path,
        batch_size: PositiveInt = 16,
        shard_size: PositiveInt = 1024,
        dtype: CacheDtype = "float32",
    ) -> None:
        """Encode the data once and write latents, labels and conditions to disk.

        A run that was stopped goes on where it was. Then train with `--data CachedLatents`.

        Args:
            model: A LatentDiffusionModule.
            datamodule: Training and validation data.
            path: The folder of the cache.
            batch_size: Pictures to encode at a time, on each process.
            shard_size: Samples in a file.
            dtype: The dtype of means and standard deviations on disk.
        """
        sizes = {"batch_size": batch_size, "shard_size": shard_size}
        cache_latents(model, datamodule, path, dtype=dtype, trainer=self, **sizes)
        rank_zero_info(f"The cache of latents is in {path}.")

    def audit(
        self,
        model: EstimatorModule,
        datamodule: LightningDataModule,
        candidates: str | Path | None = None,
        budget: PositiveFloat = 120.0,
        ckpt_path: str | Path | None = None,
    ) -> None:
        """Measure what each estimator would save per unit of compute, and advise.

        Writes audit.json, audit.md and audit.png to the run's folder. If it recommends something,
        recommended.yaml is a second --config for fit.

        Args:
            model: A module.
            datamodule: Its training data.
            candidates: A YAML file with a list of candidates, each with a name and the slots
                (draws, target, control_variate) that it fills; the package's own if not given.
            budget: Seconds to spend; it says so if the smallest number of repetitions needs more.
            ckpt_path: The checkpoint whose weights to audit: a file, or 'last' for that of the
                newest run.
        """
        if ckpt_path is not None:
            load_training_weights(model, read_checkpoint(ckpt_path), ckpt_path)
        given = None if candidates is None else read_candidates(candidates)
        found = run_audit(model, datamodule, given, budget=budget, trainer=self)
        folder = run_folder(self)
        if not self.is_global_zero:
            return
        save(found, folder)
        console = Console()
        console.print(table(found))
        for line in not_measured(found):
            console.print(line, highlight=False)
        console.print(found.advice, style="bold")
        names = "audit.json, audit.md, audit.png"
        if found.config:
            console.print(found.config, highlight=False)
            names += f"; train with `fit --config ... --config {folder / RECOMMENDED}`"
        print(f"The audit is in {folder}: {names}")

    def error_budget(
        self,
        model: DiffusionModule,
        datamodule: LightningDataModule,
        sampler: Sampler | None = None,
        samples: PositiveInt = 256,
        ckpt_path: str | Path | None = None,
    ) -> None:
        """Measure what sampling gets wrong: the start, the steps, or the learned score; and advise.

        Writes error_budget.csv, error_budget.json, error_budget.md and error_budget.png to the
        run's folder.

        Args:
            model: A module.
            datamodule: Its training data.
            sampler: What to measure, with the solver Euler or Heun; the module's own if not given.
            samples: Number of trajectories that errors are means over.
            ckpt_path: The checkpoint whose averaged weights, if it has any, to measure: a file, or
                'last' for that of the newest run.
        """
        if ckpt_path is not None:
            self._load_for_sampling(model, ckpt_path)
        found = run_error_budget(model, datamodule, sampler, samples=samples, trainer=self)
        folder = run_folder(self)
        if not self.is_global_zero:
            return
        save_error_budget(found, folder)
        console = Console()
        console.print(error_budget_table(found))
        console.print(found.advice, style="bold")
        print(f"The error budget is in {folder}: error_budget.md, .png, .csv, .json")

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[Mapping[str, float]]:
        """Test a module and measure its samples, in one table in the run's folder.

        The table is evaluation.csv, evaluation.md and evaluation.json. The callback ``Evaluation``
        says what is measured. If none is configured, one with its defaults is added: with the
        features of the first ``FrechetDistance``, and at least as many samples, if there is one.

        Args:
            model: A module; the weights come from ``ckpt_path`` if it is given.
            dataloaders: Held-out data, in place of ``datamodule``.
            ckpt_path: The checkpoint to test: a file, or 'last' for that of the newest run.
            verbose: Whether to print what the module logs.
            datamodule: Training data and held-out data.
            weights_only: As ``torch.load`` takes it.
        """
        arguments = (model, dataloaders, ckpt_path, verbose, datamodule, weights_only)
        own = callbacks_of(self)
        configured = any(isinstance(each, Evaluation) for each in own)
        # without a data module there is no training set to compare with
        if configured or datamodule is None or not isinstance(model, DiffusionModule):
            return super().test(*arguments)
        with using_callbacks(self, [*own, _evaluation(own)]):
            return super().test(*arguments)

    def export(
        self,
        model: DiffusionModule,
        output: str,
        datamodule: LightningDataModule | None = None,
        format: ExportFormat = "diffusers",  # the option's name
        ckpt_path: str | Path | None = None,
    ) -> None:
        """Write a trained model to a folder that other programs read, with a README.md.

        Args:
            model: A module.
            output: A folder that is new or empty.
            datamodule: Ignored.
            format: 'diffusers' writes a pipeline that diffusers loads without this package,
                'safetensors' the network's weights, 'onnx' its graph, 'lora' an adapter alone.
            ckpt_path: The checkpoint to export: a file, or 'last' for that of the newest run. Of
                averaged weights and those that train it takes the averaged ones.

        Raises:
            ValueError: If no checkpoint is given, or if what is written would not sample as the
                model does.
        """
        _check_samples(model, "export")
        if ckpt_path is None:
            raise ValueError(
                "`ckpt_path` must be given, as export takes a trained module, got None: name a "
                "checkpoint file, or 'last'."
            )
        checkpoint = self._load_for_sampling(model, ckpt_path)
        if self.is_global_zero:
            facts = Provenance.of_checkpoint(checkpoint, ckpt_path)
            export_model(model, output, format, facts=facts)
            print(f"The model is in {output}; its README.md says how to load it")

    def predict(  # type: ignore[override]
        self,
        model: DiffusionModule,
        datamodule: LightningDataModule | None = None,
        num_samples: PositiveInt = 100,
        batch_size: PositiveInt = 256,
        conditions: ConditionsSource | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Draw samples and write them to the run's folder, as samples.npz and samples.png.

        Args:
            model: A module; the weights come from ``ckpt_path``.
            datamodule: Ignored.
            num_samples: How many; conditions are cycled over, or classes without any.
            batch_size: How many at a time, on each process.
            conditions: What samples are conditioned on: a CSV file that names its columns, 'label'
                for classes and others for `encode_condition`, or a text file of one prompt a line.
            ckpt_path: The checkpoint to draw from: a file, or 'last' for that of the newest run.
            weights_only: As ``torch.load`` takes it.

        Raises:
            ValueError: If the module is not trained, or if there are fewer samples than processes.
        """
        _check_samples(model, "predict")
        if ckpt_path is None and model.sample_shape is None:
            raise ValueError(
                "`ckpt_path` must be given, as predict draws from a trained module: name a "
                "checkpoint file, or 'last'."
            )
        # each process draws at least one sample
        check_at_least("num_samples", num_samples, self.world_size)
        asked = None if conditions is None else Conditions.of(conditions)
        if asked is None and model.num_classes is not None:
            asked = Conditions({}, torch.arange(model.num_classes))
        numbers: Any = range(num_samples)
        loader: DataLoader[Any] = DataLoader(
            numbers, batch_size, collate_fn=partial(_requests, asked)
        )
        # requests cost nothing to load
        warnings.filterwarnings("ignore", "The 'predict_dataloader' does not have many workers")
        with using_callbacks(self, [*callbacks_of(self), SampleWriter(asked)]):
            super().predict(
                model,
                loader,
                return_predictions=False,
                ckpt_path=ckpt_path,
                weights_only=weights_only,
            )

    def _load_for_sampling(self, model: DiffusionModule, path: str | Path) -> dict[str, Any]:
        """Load the weights that a run samples with, the averaged ones where it has both."""
        checkpoint = read_checkpoint(path)
        model.on_load_checkpoint(checkpoint)
        load_weights(model, checkpoint["state_dict"], path, strict=model.strict_loading)
        return checkpoint


def _evaluation(callbacks: Iterable[Callback]) -> Evaluation:
    """Return the default evaluation, of what a ``FrechetDistance`` compares if there is one."""
    like = next((each for each in callbacks if isinstance(each, FrechetDistance)), None)
    found = Evaluation()
    if like is None:
        return found
    names = ("features", "real_samples", "sample", "clean", "cache")
    settings: dict[str, Any] = {name: getattr(like, name) for name in names}
    found = Evaluation(samples=max(found.samples, like.samples), **settings)
    found.conditions = like.conditions
    return found


def _check_samples(model: Any, command: str) -> None:
    if not isinstance(model, DiffusionModule):
        kind = type(model).__name__
        raise ValueError(
            f"`model` must be a DiffusionModule for {command}, which is of what a sampler draws, "
            f"got a {kind}: use {kind}.load_from_checkpoint in a script of your own."
        )


def _requests(conditions: Conditions | None, numbers: list[int]) -> dict[str, Any]:
    """Return what ``predict_step`` takes: the samples' numbers and what they are conditioned on."""
    index = torch.tensor(numbers)
    if conditions is None:
        return {"index": index}
    rows = conditions.rows(index)
    label = {} if rows.labels is None else {"label": rows.labels}
    return {"index": index, **label, **rows.columns}
