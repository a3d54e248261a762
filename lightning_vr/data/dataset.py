"""The form of one sample of any data set, and a data set in memory.

A sample is a dict of tensors: the clean data under ``"image"`` (float32, ``(C, H, W)``) or ``"x0"``
(float32, ``(d,)``), a class under ``"label"`` (int64) where there is one, and under ``"index"``
(int64) its position in its own data set. Estimators find a training sample among references by
that position, so the data sets set it themselves and do not leave it to a loader.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_vr.core.validation import check_finite, check_labels, check_samples

Sample = dict[str, Tensor]


class SampleDataset(Dataset[Sample], ABC):
    """A map-style data set of :data:`Sample` dicts."""

    @property
    def version(self) -> tuple[int, int] | None:
        """Which version of its samples it gives, where each epoch has another; else None."""
        return None

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Give the samples of an epoch; override it where they are drawn anew in each.

        Args:
            seed: Seed of the order of samples, the same on all ranks.
            epoch: Number of the epoch.
        """

    def stored_samples(self) -> tuple[list[Tensor], Tensor | None] | None:
        """Return samples and labels as they are stored, in files or in memory, in order.

        Returns:
            Parts ``(m, *)`` and labels ``(n,)`` or None; None if samples are made when read.
        """
        return None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def standard_deviation(self) -> float:
        """Return the standard deviation of all entries of the data around their common mean."""


class InMemoryDataset(SampleDataset):
    """A data set of tensors in memory.

    Args:
        x: Clean data of shape ``(N, *)``, real and finite; kept as float32.
        label: Classes of shape ``(N,)`` as integers, or ``None``.
        key: Name of the clean data in a sample: ``"image"`` or ``"x0"``.
        num_classes: Number of classes; required with ``label``.

    Raises:
        ValueError: If ``x`` is empty, complex, of integers or not finite, or if a label is missing
            or outside ``[0, num_classes)``.
    """

    def __init__(
        self, x: Tensor, label: Tensor | None = None, *, key: str, num_classes: int | None = None
    ) -> None:
        check_samples("x", x)
        check_finite("x", x)
        if label is not None:
            check_labels("label", label, num_classes, len(x))
            label = label.long()

        self.x = x.float()
        self.label = label
        self.key = key

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        sample = {self.key: self.x[index], "index": torch.tensor(index)}
        if self.label is not None:
            sample["label"] = self.label[index]
        return sample

    def standard_deviation(self) -> float:
        """Return the exact standard deviation of all entries of the data."""
        return float(self.x.double().std(correction=0))
