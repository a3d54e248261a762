r"""Points drawn from densities that are known exactly.

All sets are drawn from a seed: first the training set, then the validation set from the rest of
the same stream, so that the two never share a draw. Coordinates are centred and have variance one
on average, by the moments of the density and not of the draw, so that a set and its density agree
exactly. :class:`EightGaussians` holds its density as ``mixture``.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from lightning_vr.core.validation import check_at_least
from lightning_vr.data.datamodule import SplitDataModule
from lightning_vr.data.dataset import InMemoryDataset
from lightning_vr.data.mixture import GaussianMixture


class SyntheticPoints(SplitDataModule):
    """Points ``x0`` of shape ``(d,)`` with a label, drawn from a seed.

    Args:
        batch_size: Samples per batch and process.
        num_samples: Size of the training set.
        num_validation: Size of the validation set.
        seed: Seed of the draws.
        num_workers: Processes that load batches; 0 loads them in the training process.
    """

    def __init__(
        self, batch_size: int, num_samples: int, num_validation: int, seed: int, num_workers: int
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_at_least("num_samples", num_samples, 1)
        check_at_least("num_validation", num_validation, 1)
        self.num_samples = num_samples
        self.num_validation = num_validation
        self.seed = seed

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one point."""
        return (2,)

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw points of shape ``(count, d)`` and labels of shape ``(count,)``.

        Args:
            count: Number of points.
            generator: Source of randomness.
        """

    def build_datasets(self) -> tuple[InMemoryDataset, InMemoryDataset]:
        """Draw the training set, then the validation set from the same stream."""
        generator = torch.Generator().manual_seed(self.seed)
        train = self._dataset(self.num_samples, generator)
        return train, self._dataset(self.num_validation, generator)

    def _dataset(self, count: int, generator: torch.Generator) -> InMemoryDataset:
        x0, label = self.draw(count, generator)
        return InMemoryDataset(x0, label, key="x0", num_classes=self.num_classes)


class EightGaussians(SyntheticPoints):
    r"""Eight equal Gaussians on a circle, labelled by component.

    The radius is :math:`\sqrt{2 (1 - std^2)}`, which makes each coordinate's variance one.

    Args:
        batch_size: Samples per batch and process.
        std: Standard deviation of one Gaussian, in ``[0, 1)``; zero makes eight points.
        num_samples: Size of the training set.
        num_validation: Size of the validation set.
        seed: Seed of the draws.
        num_workers: Processes that load batches; 0 loads them in the training process.

    Attributes:
        mixture: The exact density, a :class:`GaussianMixture` in float64.
    """

    def __init__(
        self,
        batch_size: int = 256,
        std: float = 0.1,
        num_samples: int = 8192,
        num_validation: int = 2048,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_samples, num_validation, seed, num_workers)
        if not 0 <= std < 1:
            raise ValueError(
                f"`std` must be at least 0 and below 1, the standard deviation of the whole set, "
                f"got {std}: use a smaller one, such as 0.1."
            )

        angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        means = math.sqrt(2 * (1 - std**2)) * torch.stack([angles.cos(), angles.sin()], dim=1)
        self.mixture = GaussianMixture(means, std=std)

    @property
    def num_classes(self) -> int:
        """One class per Gaussian."""
        return 8

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw from the mixture.

        Args:
            count: Number of points.
            generator: Source of randomness.
        """
        return self.mixture.sample(count, generator)


class Moons(SyntheticPoints):
    r"""Two interleaving half circles with noise, labelled by moon.

    With a uniform angle :math:`\theta \in [0, \pi)` the moons are :math:`(\cos\theta, \sin\theta)`
    and :math:`(1 - \cos\theta, 1/2 - \sin\theta)`, as in scikit-learn, then centred and divided
    by the root of the mean of both coordinates' variances.

    Args:
        batch_size: Samples per batch and process.
        noise: Standard deviation of the noise, in radii of a moon.
        num_samples: Size of the training set.
        num_validation: Size of the validation set.
        seed: Seed of the draws.
        num_workers: Processes that load batches; 0 loads them in the training process.
    """

    def __init__(
        self,
        batch_size: int = 256,
        noise: float = 0.05,
        num_samples: int = 8192,
        num_validation: int = 2048,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_samples, num_validation, seed, num_workers)
        check_at_least("noise", noise, 0)
        self.noise = noise

    @property
    def num_classes(self) -> int:
        """One class per moon."""
        return 2

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a moon, an angle and the noise.

        Args:
            count: Number of points.
            generator: Source of randomness.
        """
        label = torch.randint(2, (count,), generator=generator)
        angle = math.pi * torch.rand(count, generator=generator)
        noise = self.noise * torch.randn(count, 2, generator=generator)

        upper = torch.stack([angle.cos(), angle.sin()], dim=1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
        points = torch.where(label.bool().unsqueeze(1), lower, upper) + noise

        horizontal = 3 / 4
        vertical = 1 / 2 - 4 / math.pi**2 + (2 / math.pi - 1 / 4) ** 2
        scale = math.sqrt((horizontal + vertical) / 2 + self.noise**2)
        return (points - torch.tensor([0.5, 0.25])) / scale, label


class Checkerboard(SyntheticPoints):
    r"""Uniform on the dark squares of a board, labelled by dark square, row by row.

    The board spans :math:`[-\sqrt 3, \sqrt 3]^2`, which makes each coordinate's variance one.

    Args:
        batch_size: Samples per batch and process.
        squares: Squares along one side, an even number; half of all squares are dark.
        num_samples: Size of the training set.
        num_validation: Size of the validation set.
        seed: Seed of the draws.
        num_workers: Processes that load batches; 0 loads them in the training process.
    """

    def __init__(
        self,
        batch_size: int = 256,
        squares: int = 4,
        num_samples: int = 8192,
        num_validation: int = 2048,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_samples, num_validation, seed, num_workers)
        if squares < 2 or squares % 2:
            raise ValueError(
                f"`squares` must be an even number of 2 or more, got {squares}: use one such as 4."
            )
        self.squares = squares

    @property
    def num_classes(self) -> int:
        """One class per dark square."""
        return self.squares**2 // 2

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a dark square and a point on it.

        Args:
            count: Number of points.
            generator: Source of randomness.
        """
        label = torch.randint(self.num_classes, (count,), generator=generator)
        within = torch.rand(count, 2, generator=generator)

        row = label // (self.squares // 2)
        column = 2 * (label % (self.squares // 2)) + row % 2
        corner = torch.stack([column, row], dim=1)
        return math.sqrt(3) * (2 * (corner + within) / self.squares - 1), label
