"""FrechetDistance: the distance of the model's samples from the training set, during training.

The squared Fréchet distance between Gaussians fitted to features of both (Heusel et al. 2017, arXiv
1706.08500). It depends on the features and on the number of samples, and only values for the same
features and number can be compared, so both are part of the metric's name. With
``InceptionFeatures`` alone it is an FID.
"""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_vr.callbacks.after_validation import AfterValidation, SampleFunction
from lightning_vr.callbacks.feature_sets import features_of_training_set, training_features
from lightning_vr.callbacks.real_samples import (
    CleanFunction,
    check_enough,
    check_training_set,
    real_samples,
)
from lightning_vr.callbacks.sample_blocks import sample_blocks
from lightning_vr.callbacks.training_samples import finite_rows
from lightning_vr.core.distributed import rank, world_size
from lightning_vr.data.conditions import ConditionsSource
from lightning_vr.lifecycle.loggers import log_numbers
from lightning_vr.lifecycle.training_set import data_size, training_batches, training_loader
from lightning_vr.metrics import Features, FrechetMetric


class FrechetDistance(AfterValidation):
    """Logs ``frechet_distance/<features>_n<samples>`` after validation.

    The real samples are the training set, which is read once. If ``EMA`` keeps averaged
    weights, these are evaluated, whatever the order of the callbacks. ``ModelCheckpoint`` can
    monitor the value.

    Args:
        features: The space to compare in. By default fixed random convolutions for images, and
            the points themselves for points.
        samples: Number of generated samples, over all ranks.
        real_samples: At most this many of the training set, evenly spaced; all if not given.
        every_n_validations: Evaluate after every n-th validation run of a fit.
        sample: A function ``(module, count) -> samples`` for modules that are no DiffusionModule.
        clean: A function from a training batch to real samples, for such modules.
        cache: Folder to keep the features of the training set in, as for ``Evaluation``. They are
            in memory then; without it sums over them are.
        conditions: What samples are conditioned on: a file of prompts or labels, or its columns;
            what validation data has if not given.

    Raises:
        ValueError: If there are no more samples than features, so that no covariance has full rank.
    """

    def __init__(
        self,
        features: Features | None = None,
        samples: int = 1000,
        real_samples: int | None = None,
        every_n_validations: int = 1,
        sample: SampleFunction | None = None,
        clean: CleanFunction | None = None,
        conditions: ConditionsSource | None = None,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(sample, every_n_validations, conditions)
        self.features = features
        self.samples = samples
        self.real_samples = real_samples
        self.clean = clean
        self.cache = cache
        self.logged: tuple[str, ...] = ("frechet_distance/",)
        self._metric: FrechetMetric | None = None
        if features is not None:
            check_enough(features, samples=samples, real_samples=real_samples)

    @property
    def state_key(self) -> str:
        """A key that differs between instances with other features or numbers of samples."""
        name = None if self.features is None else self.features.name
        return self._generate_state_key(features=name, samples=self.samples)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if the features do not fit the training data, by one sample on each rank."""
        super().on_train_start(trainer, pl_module)
        self._metric = None  # of an earlier fit's data
        features = self._features(trainer, pl_module)
        self.logged = (self._name(features),)
        count = data_size(training_loader(trainer))
        check_training_set(count, features, "FrechetDistance")

    def evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        """Generate samples, compare them with the training set and log the distance."""
        metric = self._metric or self._real_moments(trainer, module)
        self._metric = metric
        metric.reset()
        for _, samples in sample_blocks(self, trainer, module, self.samples, "frechet"):
            metric.update(samples, real=False)
        log_numbers(trainer, {self._name(metric.features): float(metric.compute())})

    def _name(self, features: Features) -> str:
        return f"frechet_distance/{features.name}_n{self.samples}"

    @torch.no_grad()
    def _real_moments(self, trainer: Trainer, module: LightningModule) -> FrechetMetric:
        metric = FrechetMetric(self._features(trainer, module), reset_real_features=False)
        features, limit = metric.to(trainer.strategy.root_device).features, self.real_samples
        if self.cache is not None:
            given = (self.clean, features, limit, self.cache, "FrechetDistance")
            values = training_features(trainer, module, *given)
            metric.update_features(values[rank() :: world_size()], real=True)
            return metric
        for positions, batch in training_batches(trainer, "Reading the training set", limit):
            real = real_samples(module, self.clean, batch)
            rows = finite_rows(real, positions, module, "FrechetDistance")
            metric.update(real if rows is None else real[rows], real=True)
        return metric

    def _features(self, trainer: Trainer, module: LightningModule) -> Features:
        features = features_of_training_set(trainer, module, self.clean, self.features)
        check_enough(features, samples=self.samples, real_samples=self.real_samples)
        return features
