"""The result of an audit, and the advice that follows from it."""

import inspect
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml
from torch import Tensor

from lightning_vr.lifecycle.configuration import imported
from lightning_vr.variance.accounting import (
    CostModel,
    best_resamples,
    noise_ratio,
    steps_ratio,
    variance_times_cost,
)
from lightning_vr.variance.bootstrap import Interval
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_statistics import GradientStatistics

_LEAST_GAIN = 1.05
"""Multiplier below which no configuration is worth changing, however certain it is."""

_NO_BOTTLENECK = 0.3
"""Noise ratio below which the removal of all noise saves less than a quarter of the steps."""

_PLAIN_FIELDS = ("name", "seconds", "config", "draws_per_sample")


@dataclass(frozen=True)
class MeasuredEstimator:
    """What was measured of one estimator.

    Attributes:
        name: Its name; ``"current"`` for the module's own.
        components: Of the variance of the batch gradient, times the batch size.
        errors: Their standard errors.
        seconds: Of one training step.
        efficiency: Variance of the current estimator over its own, RE.
        multiplier: Effective compute multiplier over the current estimator, ECM. Its interval holds
            the uncertainty of both variance and time, as the product of their intervals.
        config: Settings of the module that select it, or None if no configuration can; of the
            current estimator the settings of its slots, as far as they can be described.
        draws_per_sample: K, its draws of each sample.
    """

    name: str
    components: Components
    errors: Components
    seconds: float
    efficiency: Interval
    multiplier: Interval
    config: dict[str, Any] | None = None
    draws_per_sample: int = 1


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        estimators: The current one first.
        statistics: Of the current estimator, by group of parameters and by noise level.
        batch: Samples in a training batch, over all ranks.
        cost: Model of the seconds of a step.
        repetitions: Measurements of each estimator; fewer of those that certainly lose.
        seconds: Duration of the audit.
        skipped: Candidates that could not be measured, and why.
        least_draws: Smallest number of draws of a sample in the current estimator: 2 with
            antithetic pairs.
    """

    estimators: list[MeasuredEstimator]
    statistics: GradientStatistics
    batch: int
    cost: CostModel
    repetitions: int
    seconds: float
    skipped: dict[str, str] = field(default_factory=dict)
    least_draws: int = 1

    @property
    def current(self) -> MeasuredEstimator:
        """The module's own estimator."""
        return self.estimators[0]

    @property
    def noise_ratio(self) -> float:
        """``V / (B ‖E g‖²)``, noise over signal of the batch gradient; no bottleneck if small."""
        parts = self.current.components
        total, squared_mean = float(parts.total[0]), float(parts.squared_mean[0])
        return noise_ratio(max(total, 0.0), squared_mean, self.batch)

    @property
    def recommended(self) -> MeasuredEstimator | None:
        """Of the candidates whose ECM is certainly above 1 the one that saves most, or None.

        Savings are those of ``predicted_speedup``: whatever the ECM, a longer step pays only as far
        as noise is the bottleneck of training.
        """
        paying = [
            measured
            for measured in self.estimators[1:]
            if measured.multiplier.low > 1 and measured.multiplier.estimate >= _LEAST_GAIN
        ]
        return max(paying, key=self.predicted_speedup, default=None)

    @property
    def resamples(self) -> tuple[int, float]:
        """Noise draws of each sample, K, at which variance times cost is least, and its ECM.

        It follows from components and the cost model, relative to the K of the current estimator;
        ``fixed`` costs are left out. It is a prediction: at K draws the components timestep and
        noise are taken to be 1/K of those of one, as if draws did not depend on each other. Strata
        make them smaller at the measured K, and by another factor at another K.
        """
        parts, group = self.current.components, self.least_draws
        now = self.current.draws_per_sample // group
        between = max(0.0, float(parts.data[0]))
        within = max(0.0, now * float((parts.timestep + parts.noise)[0]))
        cost = replace(self.cost, denoise=group * self.cost.denoise)
        best = best_resamples(between, within, cost)
        present, least = (variance_times_cost(between, within, cost, k) for k in (now, best))
        return group * best, present / least if least > 0 else 1.0

    def predicted_speedup(self, measured: MeasuredEstimator) -> float:
        """Return how many times less compute it needs for the same loss, by the noise-ratio model.

        The ECM is this number where noise is the only bottleneck of training; here the steps saved
        are those of ``S = S_min (1 + noise ratio)``.
        """
        variance_ratio = 1 / measured.efficiency.estimate if measured.efficiency.estimate else 1.0
        steps = steps_ratio(self.noise_ratio, variance_ratio)
        return steps * self.current.seconds / measured.seconds

    @property
    def advice(self) -> str:
        """One recommendation in plain words."""
        best = self.recommended
        if best is None:
            return f"Variance reduction does not pay here. {self._why_not()}"
        text = (
            f"Train with {best.name}: its gradient has the variance that the current estimator "
            f"would have at {best.multiplier.estimate:.2f} times the compute (95 % interval "
            f"{best.multiplier.low:.2f} to {best.multiplier.high:.2f})."
        )
        if best.efficiency.low <= 1:
            return (
                f"Variance reduction does not pay here. {text} It saves time and no variance: its "
                f"step takes {best.seconds / self.current.seconds:.2f} times as long."
            )
        text += f" What is left of it is {_fractions(best.components)}."
        text += " Training saves that at most."
        return text + self._larger_batch(best) + self._bottleneck(best)

    def _larger_batch(self, best: MeasuredEstimator) -> str:
        """Return whether a larger batch does better than more draws of each sample."""
        factor = best.draws_per_sample / self.current.draws_per_sample
        is_better = best.efficiency.estimate < factor
        if not is_better or self.resamples[0] > self.current.draws_per_sample:
            return ""
        return (
            f" But encoding is cheap, and a batch of {factor:.3g} times as many samples would "
            f"have even less variance with as many draws."
        )

    def _bottleneck(self, best: MeasuredEstimator) -> str:
        """Return whether training has another bottleneck than noise."""
        speedup = self.predicted_speedup(best)
        if self.noise_ratio >= _NO_BOTTLENECK and speedup >= 1:
            return ""
        expected = f"{speedup:.2f} times less" if speedup >= 1 else f"{1 / speedup:.2f} times more"
        return (
            f" But noise is not the bottleneck of this training: the batch gradient has "
            f"{self.noise_ratio:.2g} times as much noise as signal, and the model of "
            f"McCandlish et al. expects {expected} compute for the same loss."
        )

    @property
    def config(self) -> str:
        """The lines of a configuration that select the recommended estimator, or an empty text."""
        if self.recommended is None or self.recommended.config is None:
            return ""
        own = self.current.config or {}
        chosen = self.recommended.config
        slots = {name: _pasteable(slot, own.get(name)) for name, slot in chosen.items()}
        settings = {"model": {"init_args": slots}}
        return str(yaml.safe_dump(settings, sort_keys=False))

    def _why_not(self) -> str:
        rivals = self.estimators[1:]
        unclear = [
            measured.name
            for measured in rivals
            if measured.multiplier.low <= 1 and measured.multiplier.high > _LEAST_GAIN
        ]
        reasons = []
        if rivals:
            best = max(rivals, key=lambda measured: measured.efficiency.estimate)
            removed = 1 - 1 / best.efficiency.estimate if best.efficiency.estimate > 0 else 0.0
            reasons.append(
                f"Of the candidates {best.name} removes most of the gradient variance, "
                f"{100 * max(removed, 0):.0f} %, and its step takes "
                f"{best.seconds / self.current.seconds:.2f} times as long."
            )
        reasons.append(f"The variance is {_fractions(self.current.components)}.")
        if unclear:
            reasons.append(
                f"This is not certain for {', '.join(unclear)}: measure longer, with a larger "
                f"budget."
            )
        return " ".join(reasons)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in the types of JSON; numbers that are not finite are None."""
        found: dict[str, Any] = _plain(
            {
                "advice": self.advice,
                "recommended": None if self.recommended is None else self.recommended.name,
                "config": self.config,
                "noise_ratio": self.noise_ratio,
                "batch": self.batch,
                "repetitions": self.repetitions,
                "seconds": self.seconds,
                "resamples": self.resamples,
                "cost": asdict(self.cost),
                "skipped": self.skipped,
                "estimators": [self._estimator(measured) for measured in self.estimators],
                "noise_levels": self.statistics.noise_levels,
                "levels": self.statistics.levels._asdict(),
                "levels_error": self.statistics.levels_error._asdict(),
                "groups": ["all", *self.statistics.groups],
            }
        )
        return found

    def _estimator(self, measured: MeasuredEstimator) -> dict[str, Any]:
        fields = {name: getattr(measured, name) for name in _PLAIN_FIELDS}
        fields |= {
            "components": measured.components._asdict(),
            "errors": measured.errors._asdict(),
            "efficiency": measured.efficiency._asdict(),
            "multiplier": measured.multiplier._asdict(),
        }
        return fields | {"saving": self.predicted_speedup(measured)}


def _fractions(parts: Components) -> str:
    total = float(parts.total[0])
    if not total > 0:
        return "not resolved from zero"
    percent = {name: 100 * float(getattr(parts, name)[0]) / total for name in parts._fields[:3]}
    return ", ".join(f"{value:.0f} % {name}" for name, value in percent.items())


def _pasteable(described: Any, present: Any = None) -> Any:
    """Return a described object with its short name, without arguments at their defaults.

    Configurations merge: an argument of a present object of the same class stays unless named.
    """
    if not isinstance(described, dict) or "class_path" not in described:
        return described
    kind: Any = imported(described["class_path"])
    is_same = isinstance(present, dict) and present.get("class_path") == described["class_path"]
    before = present.get("init_args", {}) if is_same else {}
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    arguments = {
        name: _pasteable(value, before.get(name))
        for name, value in described.get("init_args", {}).items()
        if value != defaults.get(name) or value != before.get(name, value)
    }
    is_ours = described["class_path"].startswith("lightning_vr.")
    short = {"class_path": kind.__name__ if is_ours else described["class_path"]}
    return short | ({"init_args": arguments} if arguments else {})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
