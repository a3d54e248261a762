"""Train the small classifier in whose features samples are compared with real images.

    python examples/cifar10/train_classifier.py cifar10/train cifar10/classifier.pt

The folder has a sub-folder of images for each class, of which a tenth is held out. The file is for
``ClassifierFeatures``. The same command gives the same file on the same machine.
"""

import argparse
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_vr.data import ImageFolder
from lightning_vr.metrics import ImageClassifier

LEARNING_RATE = 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="images in one sub-folder for each class")
    parser.add_argument("output", help="file to write")
    parser.add_argument("--size", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=128)
    options = parser.parse_args()

    data = ImageFolder(options.folder, options.size, options.batch_size, labels_from_folders=True)
    data.setup()
    start = time.perf_counter()
    classifier = train(data, options.epochs)
    correct = torch.cat([guesses(classifier, batch) for batch in data.val_dataloader()])
    print(
        f"{correct.float().mean():.1%} of {len(correct)} held-out images are classified right, "
        f"after {time.perf_counter() - start:.0f} s"
    )
    classifier.save(options.output)


def train(data: ImageFolder, epochs: int) -> ImageClassifier:
    """Train with mirroring and shifts by up to four pixels, at a rate that rises, then falls."""
    torch.manual_seed(0)
    assert data.num_classes is not None
    classifier = ImageClassifier(data.channels, data.size, data.num_classes)
    classifier.to(memory_format=torch.channels_last)
    loader = data.train_dataloader()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for epoch in range(epochs):
        for batch in loader:
            logits = classifier(augmented(batch["image"]))
            loss = F.cross_entropy(logits, batch["label"], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}", flush=True)
    return classifier.eval()


def augmented(images: Tensor) -> Tensor:
    """Mirror half of the images, and shift all by the same few pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    down, right = torch.randint(0, 9, (2,)).tolist()
    size = images.shape[-1]
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    return padded[..., down : down + size, right : right + size].contiguous()


@torch.no_grad()
def guesses(classifier: ImageClassifier, batch: dict[str, Tensor]) -> Tensor:
    """Return which images of a batch are classified right."""
    return classifier(batch["image"]).argmax(dim=1) == batch["label"]


if __name__ == "__main__":
    main()
