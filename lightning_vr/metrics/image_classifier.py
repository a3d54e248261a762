"""Features of a small classifier that the user trains: photographs compared without a download.

``examples/cifar10/train_classifier.py`` trains one on a folder of images by class in minutes on two
cores. A distance in its space is no FID: values compare between models judged by the same file.
"""

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vr.core.validation import check_at_least
from lightning_vr.metrics.features import Features

FEATURES = 128


class ImageClassifier(nn.Module):
    """Convolutions that halve an image three times: 128 features, then the logits of the classes.

    Args:
        channels: 1 for grey images, 3 for colour.
        size: Side of the images, in pixels.
        num_classes: Number of classes.
    """

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        check_at_least("channels", channels, 1)
        check_at_least("size", size, 8)
        check_at_least("num_classes", num_classes, 2)
        self.settings = {"channels": channels, "size": size, "num_classes": num_classes}
        self.features = nn.Sequential(
            *_convolution(channels, 32, stride=1),
            *_convolution(32, 64, stride=2),
            *_convolution(64, 96, stride=2),
            *_convolution(96, FEATURES, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, num_classes)`` of images ``(B, channels, size, size)``."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def save(self, path: str | Path) -> None:
        """Write the weights, and what it takes to build the network again."""
        torch.save({"settings": self.settings, "weights": self.state_dict()}, path)


class ClassifierFeatures(Features):
    """The 128 penultimate features of an ``ImageClassifier``.

    Their name holds a checksum of the weights: distances by other weights have other names.

    Args:
        weights: A file that ``ImageClassifier.save`` wrote.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is none of these.
    """

    def __init__(self, weights: str | Path) -> None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"`weights` must be an existing file, got {str(weights)!r}: make it by "
                f"python examples/cifar10/train_classifier.py FOLDER {weights}, for a folder with "
                f"a sub-folder of images for each class."
            )
        classifier = _load(path)
        settings = classifier.settings
        super().__init__(
            classifier.features,
            FEATURES,
            name=f"classifier-{zlib.crc32(path.read_bytes()):08x}",
            shape=(settings["channels"], settings["size"], settings["size"]),
        )


def _load(path: Path) -> ImageClassifier:
    try:
        kept: Any = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # drawing initial weights would move the global random state
            classifier = ImageClassifier(**kept["settings"])
        classifier.load_state_dict(kept["weights"], assign=True)
    except Exception as error:
        raise ValueError(
            f"`weights` must be a file that `ImageClassifier.save` wrote, got {path} "
            f"({type(error).__name__}): train the classifier again."
        ) from error
    return classifier


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
