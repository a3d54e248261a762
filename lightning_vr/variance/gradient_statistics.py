"""Statistics of a gradient: components for the whole, for groups of parameters, by noise level."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_vr.variance.components import PARTS, Components
from lightning_vr.variance.moments import Moments

NOISE_LEVEL = "noise level"
"""Name of the axis that all schedules share."""


class GradientStatistics:
    """Means of repeated measurements of ``Components``, older ones fading.

    Args:
        groups: Names of the groups of parameters.
        noise_levels: Noise level in the middle of each bin ``(L,)``; the bins are equally likely.
        state: What ``state`` has returned, to continue from there.
        parts: Names of the three components, outermost first.
        axis: What the bins are bins of.
    """

    def __init__(
        self,
        groups: list[str],
        noise_levels: Tensor,
        state: dict[str, Any] | None = None,
        parts: Sequence[str] = PARTS,
        axis: str = NOISE_LEVEL,
    ) -> None:
        self.groups = groups
        self.parts, self.axis = tuple(parts), axis
        self.noise_levels = noise_levels.detach().cpu()
        fields = len(Components._fields)
        self._whole = Moments(fields, 1 + len(groups), state=_part(state, "whole"))
        self._levels = Moments(fields, len(noise_levels), state=_part(state, "levels"))

    def add(self, components: Components, memory: float = 1.0) -> None:
        """Add a measurement: the whole gradient, then each group ``(1 + groups,)``.

        Args:
            components: What was measured; NaN where it is unknown.
            memory: Factor on the weight of all earlier ones.
        """
        self._whole.fade(memory)
        self._whole.add(torch.stack(components))

    def add_level(self, level: int, components: Components, memory: float = 1.0) -> None:
        """Add a measurement of the whole gradient with all times in one bin."""
        values = torch.full_like(self._levels.mean, torch.nan)
        values[:, level] = torch.stack(components)[:, 0]
        factor = torch.ones(len(self.noise_levels), dtype=torch.float64)
        factor[level] = memory
        self._levels.fade(factor)
        self._levels.add(values)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been measured yet."""
        return not bool(self._whole.weight.any())

    @property
    def whole(self) -> Components:
        """Components of the whole gradient and of each group ``(1 + groups,)``."""
        return Components(*self._whole.mean)

    @property
    def whole_error(self) -> Components:
        """Their standard errors."""
        return Components(*self._whole.error)

    @property
    def levels(self) -> Components:
        """Components in each bin of the noise level ``(L,)``, NaN where none was measured."""
        return Components(*self._levels.mean)

    @property
    def levels_error(self) -> Components:
        """Their standard errors."""
        return Components(*self._levels.error)

    @property
    def fractions(self) -> Tensor:
        """Fraction of each bin in ``E ‖g‖²``, ``(L,)``; NaN until all bins are measured."""
        moments = self.levels.second_moment
        return moments / moments.sum()

    def state(self) -> dict[str, Any]:
        """Return tensors, as a checkpoint keeps them."""
        return {"whole": self._whole.state(), "levels": self._levels.state()}


def _part(state: Any, name: str) -> Tensor | None:
    """Return a part of a saved state, None without one."""
    if state is None:
        return None
    if not isinstance(state, dict) or state.get(name) is None:
        raise ValueError(
            f"`statistics` of a saved GradientVariance must have `{name}`, got {state!r:.60}: the "
            f"file is damaged, use another checkpoint."
        )
    found: Tensor = state[name]
    return found
