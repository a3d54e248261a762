"""What one sample of any data set looks like, and the data set that lives in memory.

A sample is a dict of tensors: the clean data under ``"image"`` (float32, ``(C, H, W)``) or ``"x0"``
(float32, ``(d,)``), a class under ``"label"`` (int64) where there is one, and under ``"index"``
(int64) its position in its own data set. Estimators find a training sample among references by
that position, so the data sets set it themselves instead of leaving it to a loader.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.utils.data import Dataset

Sample = dict[str, Tensor]


class SampleDataset(Dataset[Sample], ABC):
    """A map-style data set of :data:`Sample` dicts."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def standard_deviation(self) -> float:
        """Standard deviation over all entries of the data, around their common mean."""


class InMemoryDataset(SampleDataset):
    """Tensors as a data set.

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
        check_samples(x)
        if label is not None:
            check_labels(label, len(x), num_classes)
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
        """Standard deviation over all entries of the data, exactly."""
        return float(self.x.double().std(correction=0))


def check_samples(x: Tensor) -> None:
    """Refuses anything but a non-empty batch of finite real numbers.

    Args:
        x: Clean data of shape ``(N, *)``.

    Raises:
        ValueError: If it is not.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"Argument `x` expected to be a real floating point tensor, but got {x.dtype}:"
            " convert it first."
        )
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(
            "Argument `x` expected to be a non-empty batch of shape (N, *),"
            f" but got shape {tuple(x.shape)}."
        )

    broken = (~x.flatten(1).isfinite().all(1)).nonzero()
    if len(broken):
        raise ValueError(
            "Argument `x` expected to be finite everywhere:"
            f" {len(broken)} of {len(x)} samples are not finite, first at index {int(broken[0])}."
        )


def check_labels(label: Tensor, count: int, num_classes: int | None) -> None:
    """Refuses anything but one class in ``[0, num_classes)`` per sample.

    Args:
        label: Classes of shape ``(count,)``.
        count: Number of samples.
        num_classes: Number of classes.

    Raises:
        ValueError: If a label is missing or out of range.
    """
    if num_classes is None:
        raise ValueError("Argument `num_classes` expected to be given with `label`, but got None.")
    if label.is_floating_point() or label.is_complex() or label.shape != (count,):
        raise ValueError(
            f"Argument `label` expected to be integers of shape ({count},),"
            f" but got {label.dtype} of shape {tuple(label.shape)}."
        )

    broken = ((label < 0) | (label >= num_classes)).nonzero()
    if len(broken):
        first = int(broken[0])
        raise ValueError(
            f"Argument `label` expected to be between 0 and {num_classes - 1}: {len(broken)} of"
            f" {count} labels are not, first at index {first}, where it is {int(label[first])}."
        )
