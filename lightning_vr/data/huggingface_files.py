"""Folders that ``save_to_disk`` of Hugging Face's ``datasets`` wrote.

Splits are loaded one by one: ``load_from_disk`` fails at a split without rows, for which nothing is
written (seen in datasets 5.2), also where nobody asks for that split.
"""

import json
from pathlib import Path
from typing import Any


def split_names(path: Path) -> list[str] | None:
    """Return the names of the splits of a data set, None if it has none.

    Args:
        path: Its folder.

    Raises:
        ValueError: If the list of splits cannot be read.
    """
    listing = path / "dataset_dict.json"
    if not listing.is_file():
        return None
    try:
        return [str(name) for name in json.loads(listing.read_text())["splits"]]
    except Exception as error:  # whatever a damaged file holds
        raise _unloadable(path, error) from error


def load_rows(path: Path) -> Any:
    """Return the ``datasets.Dataset`` of a folder, at least one row.

    Args:
        path: The folder of a data set without splits, or of a split.

    Raises:
        ImportError: If ``datasets`` is not installed.
        ValueError: If the folder holds no such data set, or no row.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError(
            "HuggingFaceImages needs the `datasets` package: pip install lightning-vr[datasets]"
        ) from error

    if _has_no_files(path):
        raise _empty(path)
    try:
        rows = Dataset.load_from_disk(str(path))
    except Exception as error:  # pyarrow and json raise their own for damaged files
        raise _unloadable(path, error) from error
    if len(rows) == 0:
        raise _empty(path)
    return rows


def _has_no_files(path: Path) -> bool:
    try:
        return bool(json.loads((path / "state.json").read_text())["_data_files"] == [])
    except Exception:  # loading says what is wrong
        return False


def _empty(path: Path) -> ValueError:
    return ValueError(
        f"`path` must be a data set of at least one row, but {path} has none: use another data set "
        f"or split."
    )


def _unloadable(path: Path, error: Exception) -> ValueError:
    text = " ".join(str(error).split())
    return ValueError(
        f"`path` must be a folder that `save_to_disk` of `datasets` wrote, got {path} "
        f"({type(error).__name__}: {text}): save the data set there first."
    )
