"""What a network says about a reverse step: the clean sample, and the variance of the step."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class ReverseEstimate(NamedTuple):
    """An estimate at some x_t.

    Attributes:
        x0: Estimate of the clean sample ``(B, *)``.
        v: What the network says about the variance ``(B, *)``, or None if it says nothing.
    """

    x0: Tensor
    v: Tensor | None = None


ReverseEstimator = Callable[[Tensor, Tensor, Tensor | None, dict[str, Any] | None], ReverseEstimate]
"""``(x_t (B, *), t (B,), class labels or None, condition or None) -> estimate``."""


def check_has_variance(found: ReverseEstimate) -> None:
    """Raise if an estimate is without a variance where a learned one is asked for."""
    if found.v is None:
        raise ValueError(
            "`variance` must be 'beta' or 'beta_tilde' for a network that returns as many channels "
            "as it takes, got 'learned': train one of twice the channels with LearnedVariance()."
        )
