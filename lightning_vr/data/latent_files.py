"""A cache of latents on disk: shards of safetensors, and an index that says what they are of.

    index.json                        written last: without it the cache is not whole
    train/latents-00001.safetensors   rows of one shard: mean, std, label, cond.text, ...
    validation/latents-00001.safetensors

A shard describes itself: its header holds the identity of the cache (digests of the autoencoder and
of the data), where its rows stand, a digest of them, and sums for the standard deviation of x0. So
shards can be written in any order, by any number of processes, and none is taken for another's.

No pickle is read. Shards are mapped into memory, and rows are read when they are asked for.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_vr.core.digests import digest

INDEX = "index.json"
SPLITS = ("train", "validation")

Posterior = Literal["sample", "mean"]
Header = dict[str, Any]

_HEADER = "latents"


@dataclass(frozen=True)
class Identity:
    """What a cache is of.

    Attributes:
        autoencoder: Digest of the autoencoder's weights and scales.
        condition: Digest of what else encodes, such as a text encoder, "" without conditions.
        data: Digest of some samples of the data.
        shard_size: Samples in each shard but the last.
        dtype: The dtype of means and standard deviations.
    """

    autoencoder: str
    condition: str
    data: str
    shard_size: int
    dtype: str


@dataclass(frozen=True)
class Sums:
    """Sums over the entries of latents, from which the standard deviation of x0 follows."""

    entries: int
    mean: float
    mean_squared: float
    variance: float

    @classmethod
    def of(cls, mean: Tensor, std: Tensor) -> "Sums":
        """Return the sums of posteriors ``(n, *)``."""
        mean, std = mean.double(), std.double()
        squares = float(mean.square().sum()), float(std.square().sum())
        return cls(mean.numel(), float(mean.sum()), *squares)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.entries + other.entries,
            self.mean + other.mean,
            self.mean_squared + other.mean_squared,
            self.variance + other.variance,
        )

    def standard_deviation(self, posterior: Posterior) -> float:
        """Return that of all entries around their common mean, by the law of total variance."""
        centre = self.mean / self.entries
        within = self.variance / self.entries if posterior == "sample" else 0.0
        return math.sqrt(max(0.0, self.mean_squared / self.entries - centre**2 + within))


@dataclass(frozen=True)
class Shard:
    """A file of latents.

    Attributes:
        file: Its name in the folder of the cache.
        first: Position of its first row in its part of the data.
        samples: Number of its rows.
        size: Its size in bytes.
    """

    file: str
    first: int
    samples: int
    size: int


@dataclass(frozen=True)
class Index:
    """The index of a whole cache.

    Attributes:
        identity: What it is of.
        num_classes: Number of classes, or None.
        shards: The files of each part of the data, in order.
        sums: Sums over each part.
    """

    identity: Identity
    num_classes: int | None
    shards: dict[str, list[Shard]]
    sums: dict[str, Sums]

    def to_json(self) -> str:
        """Return what ``read_index`` reads."""
        return json.dumps(asdict(self), indent=1)


def shard_name(split: str, number: int) -> str:
    """Return the name of a shard, whose number begins at 0, in the folder of the cache."""
    return f"{split}/latents-{number + 1:05d}.safetensors"


def read_index(folder: Path) -> Index:
    """Return the index of a cache whose files are all there.

    Raises:
        ValueError: If it is not whole, or no cache.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"`path` must be a whole cache of latents, but {folder} has no {INDEX}: name the "
            f"folder that `cache` has written, or run it again to finish one."
        )
    try:
        read = json.loads(path.read_text())
        index = Index(
            Identity(**read["identity"]),
            read["num_classes"],
            {name: [Shard(**each) for each in read["shards"][name]] for name in SPLITS},
            {name: Sums(**read["sums"][name]) for name in SPLITS},
        )
        _check_files(folder, index)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise not_whole(path, f"does not read ({type(error).__name__}: {error!s:.100})") from error
    return index


def _check_files(folder: Path, index: Index) -> None:
    for split in SPLITS:
        expected = 0
        for number, shard in enumerate(index.shards[split]):
            # no name of a file outside of the folder is followed
            if (shard.file, shard.first) != (shard_name(split, number), expected):
                raise ValueError(f"{shard.file} is not where it should be")
            path, expected = folder / shard.file, expected + shard.samples
            size = path.stat().st_size if path.is_file() else None
            if size != shard.size:
                raise ValueError(f"{shard.file} must have {shard.size} bytes, got {size}")
        if not index.sums[split].standard_deviation("sample") >= 0 or expected == 0:
            raise ValueError(f"no samples for {split}")
    if not isinstance(index.num_classes, int | None):
        raise TypeError(f"num_classes is {index.num_classes!r}")


def open_shard(path: Path) -> tuple[dict[str, Tensor], Header]:
    """Return the columns of a shard, mapped into memory, and its header.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # safetensors writes several entries in any order, and one shard would be two files
            return columns, dict(json.loads((file.metadata() or {})[_HEADER]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise not_whole(path, f"is damaged ({error!s:.100})") from error


def check_shard(
    path: Path, columns: Mapping[str, Tensor], header: Header, expected: Header
) -> None:
    """Raise if a shard is of another cache, or stands where another should.

    Args:
        path: The file.
        columns: Its columns.
        header: Its header.
        expected: What the header must hold, as ``expected_header`` says.

    Raises:
        ValueError: If so.
    """
    for name, value in expected.items():
        if header.get(name) != value:
            raise ValueError(
                f"`path` must be a cache of one autoencoder and one data set, but {path} has "
                f"{name} {header.get(name)!s:.200} and not {value!s:.200}: use another folder, or "
                f"remove this one."
            )
    rows = {len(x) if x.ndim else 0 for x in columns.values()}
    if not {"mean", "std"} <= columns.keys() or rows != {expected["samples"]}:
        raise not_whole(path, "has other columns than a cache has")


def is_as_written(columns: Mapping[str, Tensor], header: Header) -> bool:
    """Return whether the rows of a shard are those that were written."""
    return digest(columns) == header.get("digest")


def expected_header(identity: Identity, first: int, samples: int) -> Header:
    """Return what the header of a shard must hold: what it is of, and where its rows stand."""
    return {"identity": asdict(identity), "first": first, "samples": samples}


def shard_bytes(columns: dict[str, Tensor], expected: Header) -> bytes:
    """Return a shard as a file, whose header also holds a digest and the sums."""
    sums = asdict(Sums.of(columns["mean"], columns["std"]))
    header = {**expected, "digest": digest(columns), "sums": sums}
    return save(columns, {_HEADER: json.dumps(header)})


def not_whole(path: Path, reason: str) -> ValueError:
    """Return the error for a file of a cache that is not what was written."""
    return ValueError(
        f"`path` must be a whole cache of latents, but {path} {reason}: run `cache` again, which "
        f"writes what is missing."
    )
