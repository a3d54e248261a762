"""A training set, a validation set and their loaders: what all data modules here share.

The training loader shuffles and drops the last, smaller batch, because batches of different sizes
on different ranks would bias a mean over them. It distributes samples over the ranks itself; in the
validation loader Lightning puts its distributed sampler under DDP. The ``"index"`` of a sample is
its position in the data set, whatever the sampler.

A checkpoint holds the position in the training order, so that a resumed run goes on with the next
batch, also in the middle of an epoch.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_vr.core.validation import check_at_least
from lightning_vr.data.dataset import Sample, SampleDataset
from lightning_vr.data.order import EpochOrder, ResumableLoader


class SplitDataModule(LightningDataModule, ABC):
    """A data module that builds its two data sets once, at the first ``setup``.

    Args:
        batch_size: Samples per batch and process.
        num_workers: Processes that load batches; 0 loads them in the training process.
    """

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("num_workers", num_workers, 0)

        self.batch_size = batch_size
        self.num_workers = num_workers
        self._datasets: tuple[SampleDataset, SampleDataset] | None = None
        self._sigma_data: float | None = None
        # the order of training samples, and where in it a resumed run begins
        self._order_seed: int | None = None
        self._epoch = self._batches = 0

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one clean sample."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """Number of classes, None if the data has no labels."""

    @abstractmethod
    def build_datasets(self) -> tuple[SampleDataset, SampleDataset]:
        """Build the training set and the validation set."""

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a checkpoint is data from a stranger, and holds no data set.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"`{cls.__name__}` must be built by its constructor, got a checkpoint, which holds no "
            f"data set: give `ckpt_path` to the trainer, which restores the position in the data."
        )

    def setup(self, stage: str = "fit") -> None:
        """Build both data sets, whatever the stage.

        Args:
            stage: Lightning's name of the stage that is about to run.

        Raises:
            ValueError: If the training set cannot fill one batch on every process.
        """
        if self._datasets is None:
            self._datasets = self.build_datasets()
        if stage == "fit":  # a checkpoint is loaded after this
            self._epoch = self._batches = 0

        count = len(self.train_dataset)
        processes = self.trainer.world_size if self.trainer is not None else 1
        largest = count // processes
        if self.batch_size > largest:
            divided = f" divided by {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"`batch_size` must be between 1 and {largest}, the size of the training set"
                f"{divided}, got {self.batch_size}: use a smaller batch."
            )

    @property
    def train_dataset(self) -> SampleDataset:
        """The training set; the ``"index"`` in a batch is a position in it."""
        return self._datasets_for("train_dataset")[0]

    @property
    def validation_dataset(self) -> SampleDataset:
        """The validation set."""
        return self._datasets_for("validation_dataset")[1]

    @property
    def sigma_data(self) -> float:
        """Standard deviation of all entries of the training data; known after ``setup``."""
        if self._sigma_data is None:
            self._sigma_data = self._datasets_for("sigma_data")[0].standard_deviation()
        return self._sigma_data

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled batches of one size, from the position of a resumed run on."""
        trainer = self.trainer
        if self._order_seed is None and trainer is not None:
            self._order_seed = trainer.strategy.broadcast(self._seed_of_order)
        order = EpochOrder(
            self.train_dataset,
            seed=self._seed_of_order,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            epoch=self._epoch,
            start=self._batches * self.batch_size,
        )
        return ResumableLoader(
            self.train_dataset, sampler=order, drop_last=True, **self._loader_options()
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the whole validation set, in order."""
        return DataLoader(self.validation_dataset, **self._loader_options())

    def state_dict(self) -> dict[str, Any]:
        """Return the order of samples and the place in it that Lightning's counters name.

        A ``ResumableModule`` sets the place when it resumes; with other modules Lightning goes on
        with the next epoch where it has counted one as done, and so does the order.
        """
        if self.trainer is None or self._datasets is None:
            return {}
        fit: Any = self.trainer.fit_loop
        epochs, batches = fit.epoch_progress.current, fit.epoch_loop.batch_progress.current
        return {
            "seed": self._seed_of_order,
            "epoch": epochs.processed,
            "batches": batches.processed if epochs.started > epochs.processed else 0,
            "size": self.batch_size * self.trainer.world_size,
            "samples": len(self.train_dataset),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the place of a checkpoint.

        Raises:
            MisconfigurationException: If it is in the middle of an epoch of another data set or of
                batches of another size.
            ValueError: If it is none.
        """
        for name in ("seed", "epoch", "batches", "size", "samples"):
            value = state_dict.get(name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"`{name}` in the checkpoint's state of {type(self).__name__} must be a number "
                    f"of 0 or more, got {value!r}: the file is damaged, use another checkpoint."
                )
        if state_dict["batches"]:
            self._check_data(state_dict)
        self._order_seed = state_dict["seed"]
        self._epoch, self._batches = state_dict["epoch"], state_dict["batches"]

    @property
    def _seed_of_order(self) -> int:
        return torch.initial_seed() % 2**63 if self._order_seed is None else self._order_seed

    def _check_data(self, state: dict[str, Any]) -> None:
        """Raise if the rest of an epoch would be of other data."""
        ranks = 1 if self.trainer is None else self.trainer.world_size
        if state["size"] != self.batch_size * ranks:
            raise MisconfigurationException(
                f"`batch_size` must be {state['size'] / ranks:g} on {ranks} processes, as the "
                f"checkpoint is from the middle of an epoch with batches of {state['size']} "
                f"in all, got {self.batch_size}: use batches of the same size, or resume from a "
                f"checkpoint of the end of an epoch."
            )
        if state["samples"] != len(self.train_dataset):
            raise MisconfigurationException(
                f"The training set must have {state['samples']} samples, as the checkpoint is from "
                f"the middle of an epoch of so many, got {len(self.train_dataset)}: resume with "
                f"the same data, or from a checkpoint of the end of an epoch."
            )

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the validation set: none of these data sets has a test set of its own."""
        return self.val_dataloader()

    def _datasets_for(self, name: str) -> tuple[SampleDataset, SampleDataset]:
        if self._datasets is None:
            raise RuntimeError(f"`{name}` is known after `setup`: call `setup()` first.")
        return self._datasets

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def stratified_split(label: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split samples at random, each class in the same proportion to within one sample.

    Samples are ordered by class, at random within a class, and one in ``1/fraction`` of them is
    held out.

    Args:
        label: Classes of shape ``(N,)``; all equal for a plain random split.
        fraction: Fraction of the samples to hold out, rounded up to a whole number of them.
        seed: Seed of the order.

    Returns:
        Sorted positions of the training samples and of the held-out samples.

    Raises:
        ValueError: If either part would be empty.
    """
    count = len(label)
    held_out = math.ceil(fraction * count) if 0 < fraction < 1 else 0
    if not 0 < held_out < count:
        raise ValueError(
            f"`validation_fraction` must be between 0 and 1 and leave at least one sample in each "
            f"part of the split, got {fraction} of {count} samples: use a fraction such as 0.1, or "
            f"more samples."
        )

    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[label[shuffled].argsort(stable=True)]

    chosen = torch.zeros(count, dtype=torch.bool)
    every = torch.arange(held_out, dtype=torch.float64).add(0.5).mul(count / held_out).long()
    chosen[by_class[every]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
