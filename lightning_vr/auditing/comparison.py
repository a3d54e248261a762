"""What repetitions on equal draws say of candidates: variance, seconds, and what both save.

A look at candidates is a number of repetitions of the current estimator and of each of them.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_vr.auditing.candidates import CURRENT, Candidate, settings
from lightning_vr.auditing.measured_estimator import MeasuredEstimator
from lightning_vr.lifecycle.configuration import UndescribableError
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.variance.accounting import (
    effective_compute_multiplier,
    noise_ratio,
    relative_efficiency,
    steps_ratio,
    training_speedup,
)
from lightning_vr.variance.components import Components
from lightning_vr.variance.intervals import Interval, simultaneous_level
from lightning_vr.variance.moments import Moments

_LEVEL = 0.95


@dataclass
class Repetitions:
    """Repetitions of one estimator.

    Attributes:
        components: Of the batch gradient, times the batch size, ``(5, columns)`` each.
        seconds: Of a step.
    """

    components: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def plus(self, other: "Repetitions") -> "Repetitions":
        """Return those of both."""
        return Repetitions(self.components + other.components, self.seconds + other.seconds)

    def column(self, name: str) -> Tensor:
        """Return one component of the whole gradient in each repetition ``(n,)``."""
        return torch.stack(self.components)[:, Components._fields.index(name), 0]

    def moments(self) -> Moments:
        """Return means and standard errors of all components."""
        moments = Moments(*self.components[0].shape)
        for components in self.components:
            moments.add(components)
        return moments


class Comparison:
    """One look at candidates.

    Args:
        module: The module that is audited.
        batch: Samples in a training batch, over all ranks.
    """

    def __init__(self, module: EstimatorModule, batch: int) -> None:
        self._module, self._batch = module, batch
        self._found: dict[str, Repetitions] = defaultdict(Repetitions)

    def add(self, candidate: Candidate, components: Components, seconds: float) -> None:
        """Add a repetition: components of the batch gradient, and seconds of a step."""
        found = self._found[candidate.name]
        found.components.append(torch.stack(components))
        found.seconds.append(seconds)

    def add_seconds(self, shared: float) -> None:
        """Add the seconds that the steps of all estimators share to those of each."""
        for found in self._found.values():
            found.seconds = [seconds + shared for seconds in found.seconds]

    @property
    def present(self) -> Repetitions:
        """Repetitions of the current estimator."""
        return self._found[CURRENT]

    @property
    def noise_ratio(self) -> float:
        """Noise over signal of the batch gradient with the current estimator."""
        total, squared_mean = (
            float(self.present.column(name).mean()) for name in ("total", "squared_mean")
        )
        return noise_ratio(max(total, 0.0), squared_mean, self._batch)

    def current(self, found: Repetitions) -> MeasuredEstimator:
        """Return what repetitions of the current estimator say, also those of other looks."""
        slots = {name: getattr(self._module, name) for name in self._module.estimator_slots}
        config = {name: settings(slot) for name, slot in slots.items() if slot is not None}
        draws = self._module.draws.draws_per_sample
        one = Interval(1.0, 1.0, 1.0)
        return self._measured(CURRENT, found, one, one, one, None, config, draws)

    def estimator(self, candidate: Candidate, finalists: int | None = None) -> MeasuredEstimator:
        """Return what the repetitions of a candidate say.

        Args:
            candidate: One that was measured.
            finalists: Number of candidates in this look, if it is the second one.
        """
        present, own = self.present, self._found[candidate.name]
        base, variance = present.column("total"), own.column("total")
        seconds = torch.tensor(present.seconds), torch.tensor(own.seconds)
        # both estimate the same mean gradient
        signal = self._batch * (present.column("squared_mean") + own.column("squared_mean")) / 2
        plain, together = (
            training_speedup(base, variance, signal, *seconds, level=level)
            for level in (_LEVEL, simultaneous_level(_LEVEL, finalists or 1))
        )
        return self._measured(
            candidate.name,
            own,
            relative_efficiency(base, variance),
            effective_compute_multiplier(base, variance, *seconds),
            plain,
            together if finalists else None,
            _config(candidate),
            (candidate.draws or self._module.draws).draws_per_sample,
        )

    def likely_speedup(self, candidate: Candidate) -> float:
        """Return the saving that the model expects by the shortest steps of both.

        Other work of the machine only makes steps longer, so one repetition without it suffices.
        There is no interval: this ranks candidates, and the second look gives their numbers.
        """
        present, own = self.present, self._found[candidate.name]
        base, variance = present.column("total").mean(), own.column("total").mean()
        signal = self._batch * (present.column("squared_mean") + own.column("squared_mean")) / 2
        faster = min(present.seconds) / min(own.seconds)
        return float(steps_ratio(base, variance, signal.mean())) * faster

    def first_seconds(self, names: list[str]) -> list[float]:
        """Return the seconds of a step of each estimator in the first repetition."""
        return [self._found[name].seconds[0] for name in names]

    def _measured(self, name: str, found: Repetitions, *others: Any) -> MeasuredEstimator:
        moments, seconds = found.moments(), float(torch.tensor(found.seconds).median())
        parts, errors = Components(*moments.mean), Components(*moments.error)
        return MeasuredEstimator(name, parts, errors, seconds, *others)


def _config(candidate: Candidate) -> dict[str, Any] | None:
    try:
        return candidate.config()
    except UndescribableError:
        return None
