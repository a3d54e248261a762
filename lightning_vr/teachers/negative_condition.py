"""What guidance leads away from, beside each part of a condition under ``negative_`` and its name.

It goes with the condition into repeated draws and chunks, as a prompt's negative one may differ
from sample to sample.
"""

from lightning_vr.core.conditions import Condition

NEGATIVE = "negative_"


def split_negative(cond: Condition | None) -> tuple[Condition | None, Condition | None]:
    """Return a condition without its negative parts, and those under the names of the others.

    Raises:
        ValueError: If some names have a negative part and others have none.
    """
    if cond is None:
        return None, None
    negative = {
        name.removeprefix(NEGATIVE): x for name, x in cond.items() if name.startswith(NEGATIVE)
    }
    own = {name: x for name, x in cond.items() if not name.startswith(NEGATIVE)}
    if negative and negative.keys() != own.keys():
        raise ValueError(
            f"`cond` must hold a negative part for all of its names or for none, got "
            f"{sorted(cond)}: name each of them with {NEGATIVE!r} before it."
        )
    return own, negative or None
