"""Models of points in the plane with a condition beside a class label: a caption."""

import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_vr import Clean, DiffusionModule

WORDS = ("up", "down", "left", "right")


class Captioned(nn.Module):
    """A network whose output is a function of its condition, nested and not."""

    def __init__(self, num_class_embeds=None):
        super().__init__()
        self.num_class_embeds = num_class_embeds
        self.linear, self.by_text = nn.Linear(2, 2), nn.Linear(3, 2)
        self.labels = nn.Embedding(num_class_embeds or 1, 2)

    def forward(self, x, t, class_labels=None, text=None, added=None):
        out = self.linear(x) + self.by_text(text) + added["size"]
        return out if class_labels is None else out + self.labels(class_labels)


def embedded(texts):
    """Return a condition for texts: a row of one number per word, and a nested one."""
    numbers = torch.tensor([WORDS.index(text) for text in texts])
    text = torch.nn.functional.one_hot(numbers, 4)[:, :3].float()
    return {"text": text, "added": {"size": numbers[:, None].float()}}


class CaptionModule(DiffusionModule):
    """Encodes captions of batches, and those that samples are asked for."""

    def encode(self, batch):
        return Clean(batch["x0"], batch.get("label"), embedded(batch["text"]), batch["index"])

    def encode_condition(self, rows):
        return embedded(rows["prompt"])


class CaptionedPoints(Dataset):
    """Points that lie where their caption says."""

    def __init__(self, count=16, classes=None):
        self.count, self.classes = count, classes

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        x0 = torch.randn(2, generator=torch.Generator().manual_seed(i)) / 4
        label = {} if self.classes is None else {"label": i % self.classes}
        return {"x0": x0, "text": WORDS[i % 4], "index": i, **label}


def captioned(num_classes=None, **options):
    """Return a model of captioned points, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Captioned(None if num_classes is None else num_classes + 1)
    return CaptionModule(network, num_classes=num_classes, **options)
