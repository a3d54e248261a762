"""Measures of sets of generated samples against real ones, from the features of both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_vr.callbacks.evaluation_table import Measurement
from lightning_vr.core.devices import timed
from lightning_vr.core.rng import generator
from lightning_vr.metrics import (
    Memorisation,
    frechet_distance,
    kernel_distance,
    memorisation,
    precision_recall,
)
from lightning_vr.metrics.neighbours import wide

NEIGHBOURS = 3
"""The neighbour to which the balls of precision and recall reach."""

QUANTILE = 0.05
"""Fraction of held-out samples that count as close to the training set."""

_SIGNIFICANT = 1e-3
"""Probability without memorisation below which the check warns."""


@dataclass(frozen=True)
class SampleMeasures:
    """Features to measure, and how.

    Attributes:
        name: Name of the features.
        real: Features of training samples ``(N, f)``.
        held_out: Features of held-out samples ``(m, f)``; None where none are needed.
        sets: Features of the generated samples of each repeat, each ``(n, f)``.
        subsets: Number of subsets of the kernel distance.
        subset_size: Samples in each of them.
        seconds: What it took to draw the samples.
        evaluations: Calls of the network for each sample; None if not known.
    """

    name: str
    real: Tensor
    held_out: Tensor | None
    sets: Sequence[Tensor]
    subsets: int
    subset_size: int
    seconds: float
    evaluations: int | None

    def measure(self, names: Sequence[str]) -> list[Measurement]:
        """Return the measures with these names; what is no measure of samples is left out."""
        ways = {
            ("frechet_distance",): self._frechet_distance,
            ("kid",): self._kernel_distance,
            ("precision", "recall"): self._precision_recall,
            ("memorisation",): self._memorisation,
        }
        found = []
        for own, way in ways.items():
            if set(own) & set(names):
                rows, seconds = timed(way, self.real.device)
                seconds += self.seconds
                found += [
                    replace(row, seconds=seconds, evaluations=self.evaluations)
                    for row in rows
                    if row.measure in names
                ]
        return found

    def _frechet_distance(self) -> list[Measurement]:
        own = _moments(self.real)
        values = [float(frechet_distance(*own, *_moments(each))) for each in self.sets]
        return [self._row("frechet_distance", values, real=len(self.real))]

    def _row(
        self, measure: str, values: Sequence[float], samples: int | None = None, **settings: Any
    ) -> Measurement:
        settings = {"features": self.name, **settings}
        return Measurement.of_repeats(measure, values, samples or len(self.sets[0]), **settings)

    def _kernel_distance(self) -> list[Measurement]:
        sizes = {"subsets": self.subsets, "subset_size": self.subset_size}
        values = [
            kernel_distance(self.real, each, generator("kernel distance", i), **sizes)
            for i, each in enumerate(self.sets)
        ]
        return [self._row("kid", values, real=len(self.real), **sizes)]

    def _precision_recall(self) -> list[Measurement]:
        count = min(len(self.real), len(self.sets[0]))
        spaced = torch.arange(count, device=self.real.device) * len(self.real) // count
        real = self.real[spaced]
        pairs = [precision_recall(real, each[:count], NEIGHBOURS) for each in self.sets]
        return [
            self._row(name, list(values), count, real=count, neighbours=NEIGHBOURS)
            for name, values in zip(("precision", "recall"), zip(*pairs, strict=True), strict=True)
        ]

    def _memorisation(self) -> list[Measurement]:
        assert self.held_out is not None, "the check for memorisation needs held-out samples"
        found = memorisation(self.real, self.held_out, self.sets, QUANTILE)
        row = self._row(
            "memorisation",
            found.fractions,
            real=len(self.real),
            held_out=len(self.held_out),
            expected=found.expected,
            distance=found.threshold,
            p=found.p_value,
        )
        self._warn(found, row.value)
        return [row]

    def _warn(self, found: Memorisation, fraction: float) -> None:
        if found.p_value < _SIGNIFICANT:
            rank_zero_warn(
                f"Samples are closer to the training set than new data is: {100 * fraction:.1f} % "
                f"of them lie within {found.threshold:.4g} of a training sample in the features "
                f"{self.name!r}, where {100 * found.expected:.1f} % would without memorisation (p "
                f"= {found.p_value:.2g}). Compare the samples with their nearest training samples."
            )
        if found.threshold == 0:
            rank_zero_warn(
                f"{100 * found.expected:.1f} % or more of the held-out samples are training "
                f"samples in the features {self.name!r}, so that copies cannot be told from new "
                f"samples: use other held-out data, or other features."
            )


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    values = wide(features)
    size = values.shape[1]
    return values.mean(0), torch.cov(values.T).reshape(size, size)
