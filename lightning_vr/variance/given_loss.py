"""The loss of each sample as a function of the user's, for models that say nothing themselves.

It is ``loss(model, x0, noise, t)``. A function with a fifth argument gets there the ``Clean`` that
x0 comes from, with the labels ``group`` and the condition ``cond`` of each row: only such a loss
sees them, and only then do they decide which samples are exchangeable.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_vr.core.types import Clean
from lightning_vr.core.validation import check_one_per_sample

LossFunction = Callable[..., Tensor]
"""``(model, x0 (B, *), noise (B, *), t (B,)) -> loss of each sample (B,)``, or with ``clean``."""


def sees_conditions(loss: LossFunction) -> bool:
    """Return whether a loss has a fifth argument, without a default, for the ``Clean`` of rows."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except ValueError:  # of some built-in functions nothing is known
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD]
    return len(needed) >= 5


def given_clean(batch: Any) -> Clean:
    """Return the clean samples of a batch, whose conditions have a row for each."""
    return Clean.from_batch(batch).expanded()


def given_loss(loss: LossFunction, model: Any, clean: Clean, noise: Tensor, t: Tensor) -> Tensor:
    """Return what a loss gives for each sample ``(B,)``.

    Raises:
        ValueError: If it is not one number for each.
    """
    rows = (clean,) if sees_conditions(loss) else ()
    found = loss(model, clean.x0, noise, t, *rows)
    check_one_per_sample("loss", found, len(t))
    return found
