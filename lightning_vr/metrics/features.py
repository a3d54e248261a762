"""Features: the frozen networks in whose space two sets of images are compared.

A Fréchet distance depends on the feature space, and only numbers from the same space and the same
number of samples can be compared; so every feature extractor has a ``name``, which is part of the
logged key. A distance misses what its features do not represent: a classifier of digits is blind to
faint noise, and pixels to everything beyond two moments. Compare in more than one space.

Untrained convolutions are a neutral choice for images that are not photographs: Naeem et al. 2020,
arXiv 2002.09797, section 3. Inception features use the resize of TensorFlow 1, that of published
FID values: Heusel et al. 2017, arXiv 1706.08500, as ported by torch-fidelity.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_vr.core.rng import generator
from lightning_vr.core.validation import check_at_least

DIGIT_WEIGHTS = Path(__file__).with_name("digit_classifier.pt")


class Features(nn.Module):
    """A network that is always in evaluation mode, without gradients, in float32, without autocast.

    It holds a frozen copy of the network, so that training the original later does not change the
    features.

    Args:
        network: Maps ``(B, *)`` to ``(B, dimension)``; images come in ``[-1, 1]``.
        dimension: Number of features.
        name: Part of the logged key; the class of the network if not given.
        shape: Shape of one sample, with None for any size; not checked if not given.

    Raises:
        ValueError: When called, if a sample or its features have another shape than stated.

    Example:
        >>> Features(nn.Flatten(), dimension=2)(torch.zeros(5, 1, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        network: nn.Module,
        dimension: int,
        name: str | None = None,
        shape: Sequence[int | None] | None = None,
    ) -> None:
        super().__init__()
        check_at_least("dimension", dimension, 1)
        self.dimension = dimension
        self.name = name or type(network).__name__
        self.shape = None if shape is None else tuple(shape)
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``(B, dimension)`` of ``images (B, *)``, in float32."""
        self.check_images(images)
        with frozen_float32(images.device):
            features: Tensor = self.network(images.float())

        if features.shape != (len(images), self.dimension):
            raise ValueError(
                f"The network of {self.name!r} must return features of shape "
                f"{(len(images), self.dimension)} for {len(images)} samples, got "
                f"{tuple(features.shape)}: correct `dimension`, which is {self.dimension}, or "
                f"flatten the features."
            )
        return features

    def train(self, mode: bool = True) -> "Features":
        """Stay in evaluation mode whatever ``mode`` is."""
        return super().train(False)

    def check_images(self, images: Tensor) -> None:
        """Raise if images have another type or shape than the network takes."""
        if not images.is_floating_point():
            raise ValueError(
                f"`images` must be floating point, in [-1, 1], got {images.dtype}: scale bytes by "
                f"images / 127.5 - 1, and convert complex values by torch.view_as_real."
            )
        if self.shape is not None and not _fits(images, self.shape):
            sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise ValueError(
                f"`images` must have shape (B, {sizes}) for the features {self.name!r}, got "
                f"{tuple(images.shape)}: use other features."
            )


class DigitClassifier(nn.Module):
    """Convolutions on digits of 8 by 8 pixels: 32 features, then the logits of ten classes.

    ``examples/digits/train_digit_classifier.py`` trains the weights that are part of the package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, 10)`` of ``images (B, 1, 8, 8)``, with dropout in training."""
        features = F.dropout(self.features(images), 0.2, self.training)
        logits: Tensor = self.head(features)
        return logits


class DigitFeatures(Features):
    """The 32 penultimate features of a small classifier of handwritten digits.

    ``examples/digits/train_digit_classifier.py`` trains its weights, which are part of the package.

    Example:
        >>> DigitFeatures().probabilities(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(self) -> None:
        state = torch.load(DIGIT_WEIGHTS, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # drawing initial weights would move the global random state
            classifier = DigitClassifier()
        classifier.load_state_dict(state, assign=True)

        super().__init__(classifier.features, dimension=32, name="digits", shape=(1, 8, 8))
        self.head = classifier.head.requires_grad_(False)

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities ``(B, 10)`` of the ten digits for ``images (B, 1, 8, 8)``.

        A sample whose largest probability is above 0.9 counts as a recognisable digit, which 94 %
        of the real ones are.
        """
        features = self(images)
        with frozen_float32(images.device):
            probabilities: Tensor = self.head(features).softmax(dim=1)
        return probabilities


class RandomConvFeatures(Features):
    """Three untrained random convolutions, averaged over the image, for images of any size.

    Args:
        channels: Channels of the images.
        dimension: Number of features.
        seed: Seed of the weights, which are independent of the global random state.
    """

    def __init__(self, channels: int = 1, dimension: int = 64, seed: int = 0) -> None:
        check_at_least("channels", channels, 1)
        network = _RandomConvolutions((channels, 32, 64, dimension), seed)
        super().__init__(network, dimension, name="random-conv", shape=(channels, None, None))


class IdentityFeatures(Features):
    """The flattened sample itself: for points in the plane, or for pixels as they are.

    Args:
        dimension: Number of values in one sample.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__(nn.Flatten(), dimension, name="identity")


class InceptionFeatures(Features):
    """The 2048 features of Inception v3: with these a Fréchet distance is an FID.

    Values outside ``[-1, 1]`` are clamped and the images rounded to 256 levels, as in image files.

    Args:
        weights: File of the converted TensorFlow weights; it is not downloaded.

    Raises:
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: If torch-fidelity is not installed.
    """

    def __init__(self, weights: str | Path) -> None:
        network = _InceptionOnUnitRange(Path(weights).expanduser())
        super().__init__(network, dimension=2048, name="inception", shape=(3, None, None))


class _RandomConvolutions(nn.Module):
    def __init__(self, widths: Sequence[int], seed: int) -> None:
        super().__init__()
        draws = generator("random-conv", seed)
        self.kernels = nn.ParameterList()
        for inputs, outputs in pairwise(widths):
            kernel = torch.randn(outputs, inputs, 3, 3, generator=draws, device=draws.device)
            self.kernels.append(kernel * (2 / (9 * inputs)) ** 0.5)

    def forward(self, images: Tensor) -> Tensor:
        for depth, kernel in enumerate(self.kernels):
            images = F.conv2d(images, kernel, padding=1, stride=1 if depth == 0 else 2)
            images = F.leaky_relu(images, 0.2)
        return images.mean(dim=(2, 3))


class _InceptionOnUnitRange(nn.Module):
    def __init__(self, weights: Path) -> None:
        super().__init__()
        if not weights.is_file():
            raise FileNotFoundError(
                f"`weights` must be an existing file, got {str(weights)!r}: nothing is downloaded, "
                f"so download pt_inception-2015-12-05-6726825d.pth of torch-fidelity and give its "
                f"path."
            )
        try:
            import torch_fidelity  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "InceptionFeatures needs torch-fidelity: pip install lightning-vr[inception]. It "
                "reads its weights from the file that you give and downloads nothing."
            ) from error
        from torchmetrics.image.fid import NoTrainInceptionV3

        with torch.random.fork_rng(devices=[]):
            self.inception = NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], str(weights), antialias=False
            )

    def forward(self, images: Tensor) -> Tensor:
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        features: Tensor = self.inception(levels)
        return features


@contextmanager
def frozen_float32(device: torch.device) -> Iterator[None]:
    """Compute without gradients and without autocast."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _fits(images: Tensor, shape: Sequence[int | None]) -> bool:
    sizes = images.shape[1:]
    return len(sizes) == len(shape) and all(
        expected in (None, size) for size, expected in zip(sizes, shape, strict=True)
    )
