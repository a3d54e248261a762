"""Evaluation: how good the samples of a model are, in one table with standard errors.

==================  ==========================================================  ==================
measure             of                                                          module
==================  ==========================================================  ==================
frechet_distance    generated samples against the training set                  ``metrics``
kid                 the same, without a bias that depends on the number         ``metrics``
precision, recall   generated samples against equally many training samples     ``metrics``
memorisation        fraction of generated samples that are closer to the        ``metrics``
                    training set than 95 % of held-out samples are
bits_per_dimension  held-out data, by the probability-flow ODE                  ``process``
==================  ==========================================================  ==================

All but the last are in a space of features. They are computed anew for each of ``repeats`` disjoint
sets of samples, and the standard error is that of the mean over these sets: it holds what the draws
of samples add, and not what another training run or training set would. That of the bits per
dimension is over held-out samples, and holds the noise of their probes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_vr.callbacks.after_validation import AfterValidation, SampleFunction
from lightning_vr.callbacks.evaluation_table import (
    COLUMNS,
    Measurement,
    markdown,
    save,
    standard_error,
)
from lightning_vr.callbacks.feature_sets import generated_features, loader_features
from lightning_vr.callbacks.held_out_likelihood import check_precision, held_out_bits
from lightning_vr.callbacks.real_samples import (
    CleanFunction,
    check_enough,
    check_training_set,
    default_features,
    real_samples,
)
from lightning_vr.callbacks.reference_cache import cached_features
from lightning_vr.callbacks.sample_measures import NEIGHBOURS, QUANTILE, SampleMeasures
from lightning_vr.core.distributed import world_size
from lightning_vr.core.validation import check_choice, check_integer
from lightning_vr.data.conditions import ConditionsSource
from lightning_vr.lifecycle.loggers import (
    log_numbers,
    log_table,
    run_folder,
    training_goes_on,
)
from lightning_vr.lifecycle.training_set import held_out_loader, training_batches, training_loader
from lightning_vr.metrics import Features
from lightning_vr.metrics.memorisation import check_held_out
from lightning_vr.process.likelihood import Likelihood
from lightning_vr.training.module import DiffusionModule

Measure = Literal[
    "frechet_distance", "kid", "precision", "recall", "memorisation", "bits_per_dimension"
]


class Evaluation(AfterValidation):
    """Measures samples after tests and validation, and writes one table to the run's folder.

    The table is evaluation.csv, evaluation.md and evaluation.json; loggers get its numbers too, as
    ``evaluation/<measure>``. Outside of a fit it is printed. ``python -m lightning_vr test`` adds
    this callback if none is configured. If a ``WeightAveraging`` callback keeps averaged weights,
    these are evaluated.

    Args:
        measures: What to measure; all that the module allows if not given.
        samples: Number of generated samples in each repeat, over all ranks.
        repeats: Number of disjoint sets of samples; with 1 there is no standard error.
        features: The space to compare in. By default fixed random convolutions for images, and
            the points themselves for points.
        real_samples: At most this many of the training set, evenly spaced; all if not given. The
            check for memorisation finds copies of these alone.
        subsets: Number of subsets that the kernel distance is averaged over.
        subset_size: Samples in each of them.
        likelihood: How bits per dimension are computed; ``Likelihood()`` if not given.
        likelihood_samples: At most this many held-out samples for it, evenly spaced.
        cache: Folder to keep the features of the training set in; ``reference_cache`` says what is
            compared before they are used again.
        every_n_validations: Evaluate after every n-th validation run of a fit.
        sample: A function ``(module, count) -> samples`` for modules that are no DiffusionModule.
        clean: A function from a batch to real samples, for such modules.
        conditions: What samples are conditioned on: a file of prompts or labels, or its columns;
            what held-out data has if not given.

    Raises:
        ValueError: If a setting is wrong, or there are too few samples for the features.
    """

    def __init__(
        self,
        measures: Sequence[Measure] | None = None,
        samples: int = 1000,
        repeats: int = 3,
        features: Features | None = None,
        real_samples: int | None = None,
        subsets: int = 100,
        subset_size: int = 100,
        likelihood: Likelihood | None = None,
        likelihood_samples: int = 128,
        cache: str | Path | None = None,
        every_n_validations: int = 1,
        sample: SampleFunction | None = None,
        clean: CleanFunction | None = None,
        conditions: ConditionsSource | None = None,
    ) -> None:
        super().__init__(sample, every_n_validations, conditions)
        for measure in measures or ():
            check_choice("measures", measure, get_args(Measure))
        check_integer("repeats", repeats, 1)
        check_integer("subsets", subsets, 1)
        check_integer("subset_size", subset_size, 2)
        check_integer("likelihood_samples", likelihood_samples, 2)
        self.measures = measures
        self.samples = samples
        self.repeats = repeats
        self.features = features
        self.real_samples = real_samples
        self.subsets = subsets
        self.subset_size = subset_size
        self.likelihood = likelihood or Likelihood()
        self.likelihood_samples = likelihood_samples
        self.cache = cache
        self.clean = clean
        self.logged = ("evaluation/",)
        self.found: list[Measurement] = []
        self._features: Features | None = None
        self._real: Tensor | None = None
        if features is not None:
            self._check_counts(features)

    @property
    def state_key(self) -> str:
        """A key that differs between instances with other features or numbers of samples."""
        name = None if self.features is None else self.features.name
        return self._generate_state_key(features=name, samples=self.samples)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if the module cannot be sampled, or has no likelihood that was asked for."""
        super().setup(trainer, pl_module, stage)
        asked = "bits_per_dimension" in (self.measures or ())
        if asked and not isinstance(pl_module, DiffusionModule):
            raise MisconfigurationException(
                f"`measures` must not hold 'bits_per_dimension' for a {type(pl_module).__name__}, "
                f"which has no likelihood, got {list(self.measures or ())}: leave it out, or use a "
                f"DiffusionModule."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if there is no validation, or there are too few data."""
        super().on_train_start(trainer, pl_module)
        self._prepare(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if there are too few data."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._prepare(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if there are too few data."""
        self._prepare(trainer, pl_module)

    def evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure, and write, log and show the table."""
        names, found = self._chosen(module), []
        if set(names) - {"bits_per_dimension"}:
            found += self._compare(trainer, module, names)
        if "bits_per_dimension" in names and isinstance(module, DiffusionModule):
            found.append(self._likelihood(trainer, module))
        self.found = found
        self._report(trainer)

    def _chosen(self, module: LightningModule) -> Sequence[str]:
        if self.measures is not None:
            return self.measures
        is_diffusion = isinstance(module, DiffusionModule)
        names: tuple[str, ...] = get_args(Measure)
        return names if is_diffusion else [n for n in names if n != "bits_per_dimension"]

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the features, by one sample on each rank, and raise if they or the data do not fit.

        What an earlier run has read of its training set is forgotten.
        """
        self._features = self._real = None
        names = set(self._chosen(module))
        if names & {"memorisation", "bits_per_dimension"}:
            held_out = len(held_out_loader(trainer).dataset)  # type: ignore[arg-type]
            if "memorisation" in names:
                check_held_out(held_out, QUANTILE)
        if "bits_per_dimension" in names and isinstance(module, DiffusionModule):
            check_precision(module)
        if names == {"bits_per_dimension"}:
            return
        with torch.no_grad():
            for _, batch in training_batches(trainer, "Checking the data", world_size()):
                real = real_samples(module, self.clean, batch)
                features = self.features or default_features(real)
                features.check_images(real)
        self._check_counts(features)
        self._check_data(len(training_loader(trainer).dataset), features, names)  # type: ignore[arg-type]
        self._features = features.to(trainer.strategy.root_device)

    def _check_counts(self, features: Features) -> None:
        if self.measures is None or "frechet_distance" in self.measures:
            check_enough(features, samples=self.samples, real_samples=self.real_samples)
        counts = [n for n in (self.samples, self.real_samples) if n is not None]
        if (self.measures is None or "kid" in self.measures) and self.subset_size > min(counts):
            raise ValueError(
                f"`subset_size` must be at most {min(counts)}, the number of samples, got "
                f"{self.subset_size}: use smaller subsets, or more `samples`."
            )
        for name, count in (("samples", self.samples), ("real_samples", self.real_samples)):
            if count is not None:
                check_integer(name, count, NEIGHBOURS + 1)

    def _check_data(self, count: int, features: Features, names: set[str]) -> None:
        if "frechet_distance" in names:
            check_training_set(count, features, "Evaluation")
        least = max(self.subset_size if "kid" in names else 1, NEIGHBOURS + 1)
        if count < least:
            raise ValueError(
                f"The training set must have at least {least} samples for `Evaluation`, got "
                f"{count}: use more data, a smaller `subset_size`, or fewer `measures`."
            )

    def _compare(
        self, trainer: Trainer, module: LightningModule, names: Sequence[str]
    ) -> list[Measurement]:
        """Return what compares generated with real samples."""
        features = self._features
        assert features is not None, "a run's start has found the features"
        real, held_out = self._real_features(trainer, module, features), None
        if "memorisation" in names:
            loader, title = held_out_loader(trainer), "Reading held-out data"
            held_out = loader_features(trainer, module, loader, self.clean, features, title)
        sets = [
            generated_features(
                self, trainer, module, features, self.samples, "evaluation", i * self.samples
            )
            for i in range(self.repeats)
        ]
        found = SampleMeasures(features.name, real, held_out, sets, self.subsets, self.subset_size)
        return found.measure(names)

    def _likelihood(self, trainer: Trainer, module: DiffusionModule) -> Measurement:
        bits = held_out_bits(trainer, module, self.likelihood, self.likelihood_samples).tolist()
        settings = {
            name: value for name, value in vars(self.likelihood).items() if value is not None
        }
        value = sum(bits) / len(bits)
        return Measurement(
            "bits_per_dimension", value, standard_error(bits), len(bits), 1, settings
        )

    def _real_features(
        self, trainer: Trainer, module: LightningModule, features: Features
    ) -> Tensor:
        if self._real is not None:
            return self._real
        loader, title = training_loader(trainer), "Reading the training set"

        def read(limit: int | None) -> Tensor:
            return loader_features(trainer, module, loader, self.clean, features, title, limit)

        if self.cache is None:
            self._real = read(self.real_samples)
        else:
            data = loader.dataset
            self._real = cached_features(
                trainer, self.cache, features, data, self.real_samples, read
            )
        return self._real

    def _report(self, trainer: Trainer) -> None:
        numbers = {self._key(each): each.value for each in self.found}
        log_numbers(trainer, numbers)
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        with training_goes_on(trainer, f"The table {folder / 'evaluation.csv'}"):
            save(self.found, folder)
        log_table(trainer, "evaluation", COLUMNS, [each.row() for each in self.found])
        if trainer.state.fn != TrainerFn.FITTING:
            print(markdown(self.found))
            print(f"The evaluation is in {folder}: evaluation.csv, evaluation.md, evaluation.json")

    def _key(self, found: Measurement) -> str:
        if found.measure == "bits_per_dimension":
            return f"evaluation/{found.measure}"
        return f"evaluation/{found.measure}/{found.settings['features']}_n{found.samples}"
