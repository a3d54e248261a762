"""Data sets of a few samples."""

import torch
from torch.utils.data import Dataset

from lightning_vr.core.rng import generator


class Points(Dataset):
    """Samples as dictionaries, with the position of each and, where there are any, labels."""

    def __init__(self, x0, label=None, offset=0):
        self.x0, self.label, self.offset = x0, label, offset

    def __len__(self):
        return len(self.x0)

    def __getitem__(self, i):
        label = {} if self.label is None else {"label": self.label[i]}
        return {"x0": self.x0[i], **label, "index": i + self.offset}


def normal_points(count, key, dim=2):
    """Return standard normal points, always the same for a key."""
    return torch.randn(count, dim, generator=generator(key))


def two_classes(count):
    """Return labels 0 and 1 in turn."""
    return torch.arange(count) % 2
