"""A trainer that measures instead of training, and says nothing of a training."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning

_OF_TRAINING = (
    "You defined a `validation_step` but",
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "does not have many workers",
    "The number of training batches",
    "You passed in a `val_dataloader` but have no `validation_step`",
)
"""Warnings that concern training and validation alone, as seen in Lightning 2.6."""


@contextmanager
def quiet_trainer() -> Iterator[None]:
    """Leave out what Lightning says of a training; what this package and others say stays."""
    log, own = logging.getLogger("lightning.pytorch"), Path(lightning.__file__).parent

    def is_shown(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or own not in Path(record.pathname).parents

    # a filter of a logger does not see what its children log
    for handler in log.handlers:
        handler.addFilter(is_shown)
    try:
        with warnings.catch_warnings():
            for message in _OF_TRAINING:
                warnings.filterwarnings("ignore", f".*{message}")
            yield
    finally:
        for handler in log.handlers:
            handler.removeFilter(is_shown)
