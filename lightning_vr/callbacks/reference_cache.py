"""Features of training sets on disk, so that they are computed once.

A file holds the features of a training set and what they are of: the name, dimension and weights of
the features, the class of the data set, its length, and the number of samples that were asked for.
All of this is in the file's name, as a hash, and again in the file. It also holds the features of
some probes, evenly spaced in the training set. These are read and computed anew each time: where
they differ, the data, how it is encoded, or the features are others, and the file is written anew.
A change of samples that are no probes, in a data set of the same class and length, is not seen.

Files are ``.npz`` without pickled objects, written whole or not at all.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_vr.core.digests import digest
from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.metrics import Features

PROBES = 16
"""Samples of the training set whose features are compared with those in a file."""

_TOLERANCE = 1e-3
"""Difference of probes, relative to their scale, that other devices and batches may make."""

_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def cached_features(
    trainer: Trainer,
    folder: str | Path,
    features: Features,
    dataset: Any,
    limit: int | None,
    read: Callable[[int | None], Tensor],
) -> Tensor:
    """Return the features of a training set, from a file where it is of this training set.

    Args:
        trainer: The trainer; all ranks call.
        folder: Where the files are.
        features: The features.
        dataset: The training set.
        limit: Number of samples that are asked for, or None for all.
        read: Computes the features of so many samples of the training set, evenly spaced.
    """
    probes = read(min(PROBES, len(dataset)))
    identity = _identity(features, dataset, limit)
    path = Path(folder).expanduser() / _file_name(features, identity)

    found = _load(path, identity, probes) if trainer.is_global_zero else None
    found = trainer.strategy.broadcast(found)
    if found is not None:
        return torch.from_numpy(found).to(probes.device)

    values = read(limit)
    if trainer.is_global_zero:
        _save(path, identity, probes, values)
    return values


def _identity(features: Features, dataset: Any, limit: int | None) -> str:
    kind = type(dataset)
    about = {
        "features": features.name,
        "dimension": features.dimension,
        "weights": digest(features.state_dict()),
        "data set": f"{kind.__module__}.{kind.__qualname__}",
        "length": len(dataset),
        "samples": len(dataset) if limit is None else min(limit, len(dataset)),
    }
    return json.dumps(about)


def _file_name(features: Features, identity: str) -> str:
    name = "".join(letter if letter.isalnum() else "-" for letter in features.name)
    return f"{name}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"


def _load(path: Path, identity: str, probes: Tensor) -> Any:
    """Return the features in a file, or None, with a warning if it is not of this training set."""
    if not path.exists():
        return None
    try:
        # numpy leaves a file of its own open where it is damaged
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            about, known, values = str(arrays["identity"]), arrays["probes"], arrays["features"]
        problem = _difference(about, known, values, identity, probes)
    except _DAMAGE as error:
        problem = f"it is damaged ({type(error).__name__}: {error})"
    if problem is None:
        return values
    rank_zero_warn(
        f"The reference statistics {path} are not used: {problem}. They are computed again and "
        f"replaced."
    )
    return None


def _difference(about: str, known: Any, values: Any, identity: str, probes: Tensor) -> str | None:
    """Return how a file differs from what it should hold, as a clause, or None."""
    if about != identity:
        return "they are of other features or of another training set"
    if values.dtype != np.float32 or values.ndim != 2 or values.shape[1] != probes.shape[1]:
        return f"it holds {values.dtype} numbers of shape {values.shape}"
    if not np.isfinite(values).all():
        return "not all of its numbers are finite"
    own = probes.cpu().numpy()
    scale = np.abs(own).max()
    if known.shape != own.shape or not np.abs(known - own).max() <= _TOLERANCE * scale:
        return f"the features of {len(own)} samples of the training set are no longer the same"
    return None


def _save(path: Path, identity: str, probes: Tensor, values: Tensor) -> None:
    known, found = probes.cpu().numpy(), values.cpu().numpy()
    try:
        with replacing(path) as file:
            np.savez(file, identity=np.array(identity), probes=known, features=found)
    except OSError as error:
        rank_zero_warn(
            f"The reference statistics {path} could not be written ({error}): they will be "
            f"computed again next time."
        )
