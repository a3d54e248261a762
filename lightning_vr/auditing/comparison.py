"""What repetitions on equal draws say of candidates: variance, seconds, and the ECM of both.

Each candidate has as many repetitions as the current estimator, or the first few of them if it has
lost by then. Ratios are formed on common repetitions.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from lightning_vr.auditing.candidates import Candidate, settings
from lightning_vr.auditing.result import MeasuredEstimator
from lightning_vr.estimators.slot import SLOTS
from lightning_vr.estimators.targets import DSM
from lightning_vr.lifecycle.configuration import UndescribableError
from lightning_vr.training.module import DiffusionModule
from lightning_vr.variance.accounting import effective_compute_multiplier, relative_efficiency
from lightning_vr.variance.bootstrap import Interval
from lightning_vr.variance.components import Components
from lightning_vr.variance.moments import Moments

CURRENT = "current"
"""Name of the module's own estimator."""

_LOST = 0.8
"""Upper bound of the ECM below which more repetitions would only confirm that a candidate loses."""


class Comparison:
    """Repetitions of each candidate.

    Args:
        module: The module that is audited.
    """

    def __init__(self, module: DiffusionModule) -> None:
        self._module = module
        self._components: dict[str, list[Components]] = defaultdict(list)
        self._seconds: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, candidate: Candidate, components: Components, seconds: Tensor) -> None:
        """Add a repetition: components of the batch gradient, and seconds of a step."""
        self._components[candidate.name].append(components)
        self._seconds[candidate.name].append(seconds)

    @property
    def present(self) -> list[Components]:
        """Components of the current estimator in each repetition."""
        return self._components[CURRENT]

    def relative_seconds(self, candidates: list[Candidate]) -> float:
        """Return the seconds of steps with some of the candidates over those with all."""
        medians = {name: float(torch.stack(x).median()) for name, x in self._seconds.items()}
        return sum(medians[candidate.name] for candidate in candidates) / sum(medians.values())

    def has_lost(self, candidate: Candidate) -> bool:
        """Return whether no saving of time could make up for a candidate's variance.

        It does not depend on the clock: the seconds of a few steps depend on what else the machine
        does, and equal candidates must be measured equally often. A step with k draws of each
        sample takes at least k / K of the time of one with K, unless it replaces a target or a
        control variate that takes time itself.
        """
        own, replaced = self._module, candidate.slots()
        may_be_cheaper = ("target" in replaced and not isinstance(own.target, DSM)) or (
            "control_variate" in replaced and own.control_variate is not None
        )
        if candidate.name == CURRENT or may_be_cheaper:
            return False
        draws = (candidate.draws or own.draws).draws_per_sample
        speedup = max(1.0, own.draws.draws_per_sample / draws)
        return self._efficiency(candidate).high * speedup < _LOST

    def estimator(self, candidate: Candidate) -> MeasuredEstimator:
        """Return what all repetitions of a candidate say."""
        efficiency, multiplier = self._savings(candidate)
        moments = Moments(*torch.stack(self.present[0]).shape)
        for components in self._components[candidate.name]:
            moments.add(torch.stack(components))
        draws = candidate.draws or self._module.draws
        return MeasuredEstimator(
            candidate.name,
            Components(*moments.mean),
            Components(*moments.error),
            float(self._seconds_of(candidate).median()),
            efficiency,
            multiplier,
            self._config(candidate),
            draws.draws_per_sample,
        )

    def _efficiency(self, candidate: Candidate) -> Interval:
        """Return RE, from the repetitions that both estimators have."""
        own, base = (
            torch.stack([components.total[0] for components in self._components[name]])
            for name in (candidate.name, CURRENT)
        )
        return relative_efficiency(base[: len(own)], own)

    def _savings(self, candidate: Candidate) -> tuple[Interval, Interval]:
        """Return RE and ECM."""
        if candidate.name == CURRENT:
            return Interval(1.0, 1.0, 1.0), Interval(1.0, 1.0, 1.0)
        efficiency, seconds = self._efficiency(candidate), self._seconds_of(candidate)
        present = torch.stack(self._seconds[CURRENT])[: len(seconds)]
        return efficiency, effective_compute_multiplier(efficiency, present, seconds)

    def _seconds_of(self, candidate: Candidate) -> Tensor:
        """Return the seconds of a step in each repetition."""
        return torch.stack(self._seconds[candidate.name])

    def _config(self, candidate: Candidate) -> dict[str, Any] | None:
        if candidate.name == CURRENT:
            slots = {name: getattr(self._module, name) for name in SLOTS}
            return {name: settings(slot) for name, slot in slots.items() if slot is not None}
        try:
            return candidate.config()
        except UndescribableError:
            return None
