"""Averages of the weights whose length is chosen after training.

An average of relative length s weights the past by ``p_γ,t(τ) = (γ + 1) τ^γ / t^(γ + 1)``. Saved
ones ``i``, of exponents γ_i after t_i updates, approximate that of another γ after t updates by
``Σ x_i a_i``, where x solves the least-squares problem ``A x = b``,

    A_ij = ∫ p_i p_j dτ
         = (γ_i + 1)(γ_j + 1) / (t_i^(γ_i+1) t_j^(γ_j+1)) m^(γ_i+γ_j+1) / (γ_i+γ_j+1),

``m = min(t_i, t_j)``, and b_i is the same with the wanted one (Karras et al. 2024, arXiv
2312.02696, section 3.2 and appendix C). Two lengths saved at ten or more times give any length
between and around them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGEST_LENGTH = 1 / 12**0.5
"""Relative length of the plain mean, γ = 0."""


def exponent(length: float) -> float:
    """Return γ of a relative length.

    Raises:
        ValueError: If there is none.
    """
    if not 0 < length < _LARGEST_LENGTH:
        raise ValueError(
            f"`relative_lengths` must be between 0 and {_LARGEST_LENGTH:.3f}, that of the plain "
            f"mean, got {length}: use 0.05 and 0.1."
        )
    # (γ + 1) = s² (γ + 2)² (γ + 3): one root is above 0
    s = length**-2
    roots = np.roots([1, 7, 16 - s, 12 - s])
    return float(roots.real.max())


def combination(saved: Sequence[tuple[float, int]], wanted: tuple[float, int]) -> Tensor:
    """Return the factor on each saved average ``(n,)``.

    Args:
        saved: Relative length and number of updates of each.
        wanted: Those of the average that they are to give.
    """
    lengths, times = map(np.array, zip(*saved, wanted, strict=True))
    powers = np.array([exponent(length) for length in lengths])
    products = _inner_products(powers, times / times.max())
    # saved ones are nearly dependent: least squares by the pseudo-inverse
    found = np.linalg.lstsq(products[:-1, :-1], products[:-1, -1], rcond=1e-13)[0]
    return torch.from_numpy(found)


def saved_average(
    checkpoints: Sequence[dict[str, Any]],
    *,
    decay: float | None = None,
    relative_length: float | None = None,
) -> dict[str, Any]:
    """Return the weights of a module with an average that ``EMA`` has saved, or that these give.

    Load them by ``module.load_state_dict``; ``read_checkpoint`` reads a checkpoint.

    Args:
        checkpoints: Checkpoints of one run, the last one last.
        decay: Takes the average of this decay from the last checkpoint.
        relative_length: Combines the power-function averages of all checkpoints to one of this
            length after the updates of the last.

    Raises:
        ValueError: If the averages that this needs were not kept.
    """
    last = checkpoints[-1]
    states = [c.get("averaging_state", {}) for c in checkpoints]
    if (decay is None) == (relative_length is None):
        raise ValueError("`decay` or `relative_length` must be given, and not both: choose one.")
    if relative_length is None:
        decays = states[-1].get("decays", [])
        if decay not in decays:
            raise ValueError(f"`decay` must be one of the saved {decays}, got {decay}: use one.")
        chosen: dict[str, Tensor] = states[-1]["weights"][decays.index(decay)]
        return {**last["state_dict"], **chosen}
    found = [
        ((length, int(state["n_averaged"])), state["weights"][len(state["decays"]) + i])
        for state in states
        for i, length in enumerate(state.get("lengths", []))
    ]
    if not found:
        raise ValueError(
            f"`relative_length` needs checkpoints with power-function averages, got {len(states)} "
            f"without: train with EMA(relative_lengths=[0.05, 0.1])."
        )
    wanted = relative_length, int(states[-1]["n_averaged"])
    factors = combination([key for key, _ in found], wanted).tolist()
    averages = [weights for _, weights in found]
    return {**last["state_dict"], **_combined(averages, factors)}


def _combined(averages: Sequence[dict[str, Tensor]], factors: Sequence[float]) -> dict[str, Tensor]:
    """Return a linear combination, summed in float64."""
    combined = {}
    for name, x in averages[-1].items():
        total = torch.zeros_like(x, dtype=torch.float64)
        for factor, each in zip(factors, averages, strict=True):
            total += factor * each[name].double()
        combined[name] = total.to(x.dtype)
    return combined


def _inner_products(powers: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return ``∫ p_i p_j dτ`` ``(n, n)``."""
    p, q, t, u = powers[:, None], powers[None], times[:, None], times[None]
    least = np.minimum(t, u)
    # the ratios of times keep large powers from overflowing
    scale = (least / t) ** p * (least / u) ** q * least / (t * u)
    products: np.ndarray = (p + 1) * (q + 1) / (p + q + 1) * scale
    return products
