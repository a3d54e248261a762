"""Names that may have been meant by one that does not exist."""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_vr.data.images import ImageDataModule
from lightning_vr.training.module import DiffusionModule

ANY_BASE = (nn.Module, Optimizer, LRScheduler)
"""Base classes of a class whose own base the parser does not name."""

_SECTIONS = {"trainer": Trainer, "model": DiffusionModule, "data": ImageDataModule}


def close_names(name: str, names: Iterable[str]) -> list[str]:
    """Return at most three of ``names`` that are close to ``name``, the closest first."""
    lower = {known.lower(): known for known in names if not known.startswith("_")}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.8)
    return [lower[each] for each in near if near[0] != name.lower() or each == near[0]]


def close_settings(name: str) -> list[str]:
    """Return settings that ``name`` may stand for: misspelt, or at another level."""
    known = [*_SECTIONS, "config", "ckpt_path", "seed_everything", "model.optimizer.lr"] + [
        f"{section}.{parameter}"
        for section, kind in _SECTIONS.items()
        for parameter in inspect.signature(kind).parameters
    ]
    section, _, rest = name.partition(".")
    inside = [each.removeprefix(f"{section}.") for each in known if each.startswith(f"{section}.")]
    if inside:
        return [f"{section}.{each}" for each in close_names(rest, inside)]
    return [each for each in known if each.endswith(f".{section}")] or close_names(name, known)


def subclass_names(bases: Iterable[Any]) -> list[str]:
    """Return the short names of the public, concrete classes below ``bases``."""
    kinds = [kind for base in bases if isinstance(base, type) for kind in _below(base)]
    return [
        kind.__name__
        for kind in dict.fromkeys(kinds)
        if not kind.__name__.startswith("_") and not inspect.isabstract(kind)
    ]


def _below(kind: type) -> list[type]:
    if kind is type(None) or kind in (int, float, str, bool, list, tuple, dict, object):
        return []
    children: list[type] = type.__subclasses__(kind)
    # base classes of other libraries are not meant to be used themselves
    own = [kind] if kind.__module__.startswith("lightning_vr.") else []
    return [*own, *(each for child in children for each in [child, *_below(child)])]
