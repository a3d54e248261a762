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
variational_bound   the same, bounded over the steps of a table of timesteps,   ``process``
                    with a learned variance and with fixed ones
==================  ==========================================================  ==================

All but the last two are in a space of features. They are computed anew for each of ``repeats``
disjoint sets of samples, and the standard error is that of the mean over these sets: it holds what
the draws of samples add, and not what another training run or training set would. That of the bits
per dimension is over held-out samples, and holds the noise of their probes and draws.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_vr.callbacks.after_validation import AfterValidation, SampleFunction
from lightning_vr.callbacks.evaluation_counts import check_counts, check_data
from lightning_vr.callbacks.evaluation_table import COLUMNS, Measurement, markdown, save
from lightning_vr.callbacks.feature_sets import (
    features_of_training_set,
    generated_features,
    loader_features,
    training_features,
)
from lightning_vr.callbacks.held_out_likelihood import bound_rows, check_precision, likelihood_rows
from lightning_vr.callbacks.real_samples import CleanFunction
from lightning_vr.callbacks.sample_measures import QUANTILE, SampleMeasures
from lightning_vr.core.devices import timed
from lightning_vr.core.distributed import gather_objects
from lightning_vr.core.validation import check_choice, check_integer
from lightning_vr.data.conditions import ConditionsSource
from lightning_vr.lifecycle.loggers import (
    log_numbers,
    log_table,
    run_folder,
    training_goes_on,
)
from lightning_vr.lifecycle.training_set import data_size, held_out_loader, training_loader
from lightning_vr.metrics import Features
from lightning_vr.metrics.memorisation import check_held_out
from lightning_vr.process.likelihood import Likelihood
from lightning_vr.process.reverse_steps import check_discrete, is_discrete
from lightning_vr.process.variational_bound import VariationalBound
from lightning_vr.training.module import DiffusionModule

Measure = Literal[
    "frechet_distance",
    "kid",
    "precision",
    "recall",
    "memorisation",
    "bits_per_dimension",
    "variational_bound",
]
_OF_HELD_OUT = ("bits_per_dimension", "variational_bound")

_LEAST = {"repeats": 1, "subsets": 1, "subset_size": 2, "likelihood_samples": 2}
"""Smallest value of each number."""


class Evaluation(AfterValidation):
    """Measures samples after tests and validation, and writes one table to the run's folder.

    The table is evaluation.csv, evaluation.md and evaluation.json; loggers get its numbers too, as
    ``evaluation/<measure>``. Outside of a fit it is printed. ``python -m lightning_vr test`` adds
    this callback if none is configured, with the features of a ``FrechetDistance`` if there is one.
    If ``EMA`` keeps averaged weights, these are evaluated.

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
        bound: How the variational bound is computed; over at most 100 timesteps if not given.
        likelihood_samples: At most this many held-out samples for both, evenly spaced.
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
        bound: VariationalBound | None = None,
        cache: str | Path | None = None,
        every_n_validations: int = 1,
        sample: SampleFunction | None = None,
        clean: CleanFunction | None = None,
        conditions: ConditionsSource | None = None,
    ) -> None:
        super().__init__(sample, every_n_validations, conditions)
        for measure in measures or ():
            check_choice("measures", measure, get_args(Measure))
        self.measures = measures
        self.samples = samples
        self.repeats = repeats
        self.features = features
        self.real_samples = real_samples
        self.subsets = subsets
        self.subset_size = subset_size
        self.likelihood = likelihood or Likelihood()
        self.likelihood_samples = likelihood_samples
        self.bound = bound
        self.cache = cache
        self.clean = clean
        self.logged = ("evaluation/",)
        self.found: list[Measurement] = []
        self._features: Features | None = None
        self._real: Tensor | None = None
        self._check_numbers()

    @property
    def state_key(self) -> str:
        """A key that differs between instances with other features or numbers of samples."""
        name = None if self.features is None else self.features.name
        return self._generate_state_key(features=name, samples=self.samples)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if the module cannot be sampled, or has no likelihood that was asked for."""
        super().setup(trainer, pl_module, stage)
        asked = [name for name in self.measures or () if name in _OF_HELD_OUT]
        if asked and not isinstance(pl_module, DiffusionModule):
            raise MisconfigurationException(
                f"`measures` must not hold {asked[0]!r} for a {type(pl_module).__name__}, which "
                f"has no likelihood, got {list(self.measures or ())}: leave it out, or use a "
                f"DiffusionModule."
            )
        wants_bound = "variational_bound" in asked or self.bound is not None
        if wants_bound and isinstance(pl_module, DiffusionModule):
            check_discrete(pl_module.schedule)

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
        if set(names) - set(_OF_HELD_OUT):
            found += self._compare(trainer, module, names)
        if isinstance(module, DiffusionModule):
            count = self.likelihood_samples
            if "bits_per_dimension" in names:
                found += likelihood_rows(trainer, module, self.likelihood, count)
            if "variational_bound" in names:
                found += bound_rows(trainer, module, self.bound, count)
        self.found = found
        self._report(trainer)

    def _chosen(self, module: LightningModule) -> Sequence[str]:
        if self.measures is not None:
            return self.measures
        left_out = set(_OF_HELD_OUT)
        if isinstance(module, DiffusionModule):
            left_out = set() if is_discrete(module.schedule) else {"variational_bound"}
        return [name for name in get_args(Measure) if name not in left_out]

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the features, by one sample on each rank, and raise if they or the data do not fit.

        What an earlier run has read of its training set is forgotten.
        """
        self._features = self._real = None
        names = set(self._chosen(module))
        if names & {"memorisation", *_OF_HELD_OUT}:
            held_out = data_size(held_out_loader(trainer))
            if "memorisation" in names:
                check_held_out(held_out, QUANTILE)
        if "bits_per_dimension" in names and isinstance(module, DiffusionModule):
            check_precision(module)
        if names <= set(_OF_HELD_OUT):
            return
        features = features_of_training_set(trainer, module, self.clean, self.features)
        check_counts(features, self.measures, *self._counts())
        count = data_size(training_loader(trainer))
        check_data(count, features, names, self.subset_size)
        self._features = features.to(trainer.strategy.root_device)

    def _check_numbers(self) -> None:
        for name, least in _LEAST.items():
            check_integer(name, getattr(self, name), least)
        if self.features is not None:
            check_counts(self.features, self.measures, *self._counts())

    def _counts(self) -> tuple[int, int | None, int]:
        return self.samples, self.real_samples, self.subset_size

    def _compare(
        self, trainer: Trainer, module: LightningModule, names: Sequence[str]
    ) -> list[Measurement]:
        """Return what compares generated with real samples."""
        features = self._features
        assert features is not None, "a run's start has found the features"
        real, held_out = self._real_features(trainer, module, features), None
        if "memorisation" in names:
            loader, title = held_out_loader(trainer), "Reading held-out data"
            given = (self.clean, features, title, "Evaluation")
            held_out = loader_features(trainer, module, loader, *given)

        def draw() -> list[Tensor]:
            parts = (trainer, module, features, self.samples, "evaluation")
            starts = range(0, self.repeats * self.samples, self.samples)
            return [generated_features(self, *parts, start) for start in starts]

        sets, seconds = timed(draw, trainer.strategy.root_device)
        sizes = (self.subsets, self.subset_size)
        evaluations = self._evaluations(module)
        found = SampleMeasures(features.name, real, held_out, sets, *sizes, seconds, evaluations)
        return found.measure(names)

    def _evaluations(self, module: LightningModule) -> int | None:
        """Return the calls of the network for a sample, the most of all ranks, if known."""
        if self.sample is not None or not isinstance(module, DiffusionModule):
            return None
        counts: list[int] = gather_objects(module.sample_evaluations)
        return max(counts)

    def _real_features(
        self, trainer: Trainer, module: LightningModule, features: Features
    ) -> Tensor:
        if self._real is None:
            given = (self.clean, features, self.real_samples, self.cache, "Evaluation")
            self._real = training_features(trainer, module, *given)
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
        if found.measure == "variational_bound":
            return f"evaluation/{found.measure}/{found.settings['variance']}"
        return f"evaluation/{found.measure}/{found.settings['features']}_n{found.samples}"
