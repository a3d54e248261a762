"""Handwritten digits: 1797 real images of 8 by 8 pixels that come with scikit-learn.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998 (its test set). Small enough to train on one processor core, and for the whole
training set to serve as references.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_vr.data.datamodule import SplitDataModule, stratified_split
from lightning_vr.data.dataset import InMemoryDataset


def digits() -> tuple[Tensor, Tensor]:
    """Return all digits, those of training and validation.

    Returns:
        Images, float32 of shape ``(1797, 1, 8, 8)``, the 17 grey levels scaled to ``[-1, 1]``, and
        labels, int64 of shape ``(1797,)``.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(data.target).long()


class Digits(SplitDataModule):
    """Handwritten digits of shape ``(1, 8, 8)`` in ``[-1, 1]``, ten classes.

    Args:
        batch_size: Samples per batch and process.
        validation_fraction: Fraction of each class to hold out; 0.2 holds out 360 of 1797 images.
        seed: Seed of the split.
        num_workers: Processes that load batches; 0 loads them in the training process.
        classes: The digits to keep, which keep their labels; all ten if not given.
    """

    def __init__(
        self,
        batch_size: int = 128,
        validation_fraction: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        kept = range(10) if classes is None else classes
        if not kept or not set(kept) <= set(range(10)):
            raise ValueError(
                f"`classes` must be digits from 0 to 9, got {classes}: give a list such as [0, 1]."
            )
        self.classes = sorted(set(kept))
        self.validation_fraction = validation_fraction
        self.seed = seed

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return (1, 8, 8)

    @property
    def num_classes(self) -> int:
        """Ten, one for each digit, whichever are kept."""
        return 10

    def build_datasets(self) -> tuple[InMemoryDataset, InMemoryDataset]:
        """Split the digits by class."""
        images, labels = digits()
        is_kept = torch.isin(labels, torch.tensor(self.classes))
        images, labels = images[is_kept], labels[is_kept]
        train, validation = stratified_split(labels, self.validation_fraction, self.seed)
        return (
            self._dataset(images[train], labels[train]),
            self._dataset(images[validation], labels[validation]),
        )

    def _dataset(self, images: Tensor, labels: Tensor) -> InMemoryDataset:
        return InMemoryDataset(images, labels, key="image", num_classes=self.num_classes)
