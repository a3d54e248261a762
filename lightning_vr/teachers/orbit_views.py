"""Views of a scene from a sphere around it, also in antipodal pairs.

The view is a level of randomness above time and noise: R views of K draws each have the variance
``(V_B + V_W / K) / R``. Views opposite to each other show different sides of a scene, and
their gradients may have less variance than those of independent views (antithetic sampling of the
camera; "Variance Reduction on the Camera Axis", 2026, arXiv 2606.29964). Whether more views or
more noise pays is a matter of measured variances and costs: ``GradientVariance`` and the pilot of
``CARV("auto")`` take a pair as one unit.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_vr.core.validation import check_integer


class ViewBatch(NamedTuple):
    """What ``render`` gets where a module draws its views.

    Attributes:
        azimuth: Angles around the vertical axis in radians ``(R,)``.
        elevation: Angles above the horizon in radians ``(R,)``.
        batch: What the loader gave.
    """

    azimuth: Tensor
    elevation: Tensor
    batch: Any


@dataclass(frozen=True)
class OrbitViews:
    """Views that are uniform in azimuth and, on the sphere, in elevation.

    Attributes:
        count: R, views of a batch and process.
        azimuth: Smallest and largest azimuth in degrees.
        elevation: Smallest and largest elevation in degrees.
        antipodal: Whether views are pairs whose directions are opposite within the ranges: their
            quantiles of azimuth are half of the range apart, those of elevation mirror each other.
    """

    count: int = 1
    azimuth: tuple[float, float] = (-180.0, 180.0)
    elevation: tuple[float, float] = (-10.0, 45.0)
    antipodal: bool = False

    def __post_init__(self) -> None:
        check_integer("count", self.count, 2 if self.antipodal else 1)
        if self.antipodal and self.count % 2:
            raise ValueError(
                f"`count` must be even with antipodal pairs of views, got {self.count}: use "
                f"{self.count + 1}, or antipodal=False."
            )
        for name, (low, high), largest in (
            ("azimuth", self.azimuth, 360.0),
            ("elevation", self.elevation, 90.0),
        ):
            if not -largest <= low <= high <= largest:
                raise ValueError(
                    f"`{name}` must be two angles in degrees between {-largest:g} and "
                    f"{largest:g}, the smaller first, got {low} and {high}: change one of them."
                )

    @property
    def rows(self) -> int:
        """Number of consecutive views that depend on each other."""
        return 2 if self.antipodal else 1

    def draw(self, source: torch.Generator, batch: Any = None) -> ViewBatch:
        """Draw the views of a batch, on the device of a generator."""
        units = self.count // self.rows
        u = torch.rand(units, 2, generator=source, device=source.device)
        if self.antipodal:
            opposite = torch.stack([(u[:, 0] + 0.5) % 1, 1 - u[:, 1]], dim=1)
            u = torch.stack([u, opposite], dim=1).flatten(0, 1)
        low, high = (math.radians(bound) for bound in self.azimuth)
        bottom, top = (math.sin(math.radians(bound)) for bound in self.elevation)
        azimuth = low + (high - low) * u[:, 0]
        elevation = torch.asin((bottom + (top - bottom) * u[:, 1]).clamp(-1, 1))
        return ViewBatch(azimuth, elevation, batch)
