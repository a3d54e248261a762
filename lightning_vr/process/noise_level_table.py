"""Positive numbers at noise levels, linear in log s between them: densities, weights, losses."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float


class NoiseLevelTable:
    """Numbers at increasing noise levels.

    Args:
        noise_levels: Noise levels s = sigma/alpha, positive and increasing, two or more.
        values: A number for each, not negative.

    Raises:
        ValueError: If they are something else.
    """

    def __init__(self, noise_levels: Sequence[float], values: Sequence[float]) -> None:
        rises = all(0 < low < high < torch.inf for low, high in pairwise(noise_levels))
        if len(noise_levels) < 2 or not rises:
            raise ValueError(
                f"`noise_levels` must be two or more increasing positive numbers, got "
                f"{[*noise_levels]}: sort them, and leave out 0."
            )
        valid = all(0 <= value < torch.inf for value in values)
        if len(values) != len(noise_levels) or not valid or not sum(values) > 0:
            raise ValueError(
                f"There must be a finite number of 0 or more for each of the {len(noise_levels)} "
                f"`noise_levels`, not all 0, got {[*values]}: give as many."
            )
        self.noise_levels, self.values = [*noise_levels], [*values]

    def columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return log s and the values ``(L,)`` on a device, in the widest type that it has."""
        dtype = widest_float(device)
        levels = torch.tensor(self.noise_levels, dtype=dtype, device=device)
        return levels.log(), torch.tensor(self.values, dtype=dtype, device=device)

    def __call__(self, noise_level: Tensor) -> Tensor:
        """Return the number at noise levels ``(B,)``: that of the nearer end outside the table."""
        logs, values = self.columns(noise_level.device)
        at = noise_level.to(logs).log().clamp(logs[0], logs[-1])
        cell = (torch.searchsorted(logs, at, right=True) - 1).clamp(0, len(logs) - 2)
        fraction = (at - logs[cell]) / (logs[cell + 1] - logs[cell])
        return torch.lerp(values[cell], values[cell + 1], fraction).to(noise_level.dtype)

    def covers(self, noise_level: Tensor) -> Tensor:
        """Return whether noise levels lie within the table, up to rounding."""
        low, high = self.noise_levels[0], self.noise_levels[-1]
        rounding = 1e-6
        return (noise_level >= low * (1 - rounding)) & (noise_level <= high * (1 + rounding))
