"""The result of an audit, and the advice that follows from it."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_vr.auditing.measured_estimator import MeasuredEstimator
from lightning_vr.auditing.pasted_configuration import pasted_configuration
from lightning_vr.auditing.step_cost import StepCost
from lightning_vr.variance.accounting import best_resamples, noise_ratio, variance_times_cost
from lightning_vr.variance.components import PARTS, Components
from lightning_vr.variance.gradient_statistics import GradientStatistics

LEAST_GAIN = 1.05
"""Predicted speedup below which no configuration is worth changing, however certain it is."""

_NO_BOTTLENECK = 0.3
"""Noise ratio below which the removal of all noise saves less than a quarter of the steps."""

_CHEAP = 0.1
"""Fraction of a step below which ``encode`` is cheap."""

_NAMED = 3
"""Candidates that are named as uncertain."""


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        estimators: The current one first.
        statistics: Of the current estimator, by group of parameters and by noise level.
        batch: Samples in a training batch, over all ranks.
        cost: Seconds of a step by its size.
        repetitions: Measurements of each estimator in the first look, over all ranks.
        second_repetitions: Those of each finalist in the second look.
        seconds: Duration of the audit.
        budget: Seconds that it was given.
        skipped: Candidates that could not be measured, and why.
        least_draws: Smallest number of draws of a sample in the current estimator: 2 with
            antithetic pairs.
    """

    estimators: list[MeasuredEstimator]
    statistics: GradientStatistics
    batch: int
    cost: StepCost
    repetitions: int
    second_repetitions: int
    seconds: float
    budget: float
    skipped: dict[str, str] = field(default_factory=dict)
    least_draws: int = 1

    @property
    def current(self) -> MeasuredEstimator:
        """The module's own estimator."""
        return self.estimators[0]

    @property
    def unit(self) -> str:
        """What a batch is a number of: samples, views."""
        outermost = self.statistics.parts[0]
        return "sample" if outermost == PARTS[0] else outermost

    @property
    def finalists(self) -> list[MeasuredEstimator]:
        """The candidates that were measured again."""
        return [measured for measured in self.estimators if measured.is_finalist]

    @property
    def noise_ratio(self) -> float:
        """``V / (B ‖E g‖²)``, noise over signal of the batch gradient; no bottleneck if small."""
        parts = self.current.components
        total, squared_mean = float(parts.total[0]), float(parts.squared_mean[0])
        return noise_ratio(max(total, 0.0), squared_mean, self.batch)

    @property
    def recommended(self) -> MeasuredEstimator | None:
        """Of the finalists that are expected to save compute for certain the best one, or None.

        For certain: the interval that holds for all of them at once lies above 1. What is expected
        follows from the noise-ratio model: whatever the ECM, a longer step pays only as far as
        noise is the bottleneck of training.
        """
        paying = [
            measured
            for measured in self.finalists
            if measured.simultaneous is not None
            and measured.simultaneous.low > 1
            and measured.predicted_speedup.estimate >= LEAST_GAIN
        ]
        return max(paying, key=lambda each: each.predicted_speedup.estimate, default=None)

    @property
    def resamples(self) -> tuple[int, float] | None:
        """Noise draws of each sample, K, at which variance times cost is least, and its ECM.

        It follows from components and costs, relative to the K of the current estimator; ``fixed``
        costs are left out. It is a prediction: at K draws the components timestep and noise are
        taken to be 1/K of those of one, as if draws did not depend on each other. Strata make them
        smaller at the measured K, and by another factor at another K. A component that is smaller
        than its standard error counts as that.

        None if the intervals of the costs leave open which K that is.
        """
        parts, errors, group = self.current.components, self.current.errors, self.least_draws
        now = self.current.draws_per_sample // group
        error = float(errors.data[0])
        between = max(float(parts.data[0]), 0.0 if math.isnan(error) else error)
        within = max(0.0, now * float((parts.timestep + parts.noise)[0]))
        fewest, best, most = (
            best_resamples(between, within, replace(cost, denoise=group * cost.denoise))
            for cost in self.cost.range()
        )
        # a network that costs nothing was not resolved either
        if most > 4 * fewest or (most > 1 and self.cost.denoise.low <= 0):
            return None
        cost = replace(self.cost.model, denoise=group * self.cost.model.denoise)
        present, least = (variance_times_cost(between, within, cost, k) for k in (now, best))
        return group * best, present / least if least > 0 else 1.0

    @property
    def advice(self) -> str:
        """One recommendation in plain words."""
        best = self.recommended
        if best is None:
            return self._why_not()
        expected, multiplier, together = best.predicted_speedup, best.multiplier, best.simultaneous
        assert together is not None
        text = (
            f"Train with {best.name}: the noise-ratio model of McCandlish et al. expects "
            f"{expected.estimate:.2f} times less compute for the same loss (95 % interval "
            f"{expected.low:.2f} to {expected.high:.2f}; {together.low:.2f} to "
            f"{together.high:.2f} for all {len(self.finalists)} finalists at once)."
        )
        if best.efficiency.low <= 1:
            return (
                f"Variance reduction does not pay here. {text} It saves time and no variance: its "
                f"step takes {best.seconds / self.current.seconds:.2f} times as long."
            )
        text += (
            f" Its gradient has the variance that the current estimator would have at "
            f"{multiplier.estimate:.2f} times the compute ({multiplier.low:.2f} to "
            f"{multiplier.high:.2f}): training saves that at most. What is left of it is "
            f"{self._fractions(best.components)}."
        )
        return text + self._larger_batch(best)

    @property
    def config(self) -> str:
        """The lines of a configuration that select the recommended estimator, or an empty text."""
        if self.recommended is None or self.recommended.config is None:
            return ""
        return pasted_configuration(self.recommended.config, self.current.config or {})

    def _larger_batch(self, best: MeasuredEstimator) -> str:
        """Return whether a larger batch does better than more draws of each sample.

        Compared are the draws alone: with them and with the present draws at the same target.
        """
        factor = best.draws_per_sample / self.current.draws_per_sample
        encode = self.cost.upstream.estimate * self.batch / self.current.seconds
        plain = self._with_present_draws(best)
        if factor <= 1 or encode > _CHEAP or plain is None:
            return ""
        gain = best.efficiency.estimate / plain.efficiency.estimate
        if gain >= factor:
            return ""
        return (
            f" But its draws alone divide the variance by {gain:.2f}, encoding is cheap, and a "
            f"batch of {factor:.3g} times as many samples would divide it by {factor:.3g} with as "
            f"many draws."
        )

    def _with_present_draws(self, best: MeasuredEstimator) -> MeasuredEstimator | None:
        """Return what differs from a finalist in its draws alone, if it is one or the current."""
        others = {name: x for name, x in (best.config or {}).items() if name != "draws"}
        if best.config is None:
            return None
        if not others:
            return self.current
        return next((each for each in self.finalists if each.config == others), None)

    def _why_not(self) -> str:
        if float(self.current.components.total[0]) == 0:  # as of a network that is all zeros
            return (
                "Variance reduction does not pay here. The gradient has no variance at these "
                "weights: audit a checkpoint that has been trained."
            )
        rivals = self.estimators[1:]
        unclear = [
            measured
            for measured in rivals
            if (measured.simultaneous or measured.predicted_speedup).high > LEAST_GAIN
        ]
        may_pay = any(each.predicted_speedup.estimate >= LEAST_GAIN for each in unclear)
        said = "Variance reduction does not pay here."
        if may_pay:
            said = "Whether variance reduction pays here is not certain."
        reasons = [said, *([self._nearest(rivals)] if rivals else [])]
        reasons.append(f"The variance is {self._fractions(self.current.components)}.")
        if unclear:
            unclear.sort(key=lambda each: -each.predicted_speedup.estimate)
            names = ", ".join(f'"{each.name}"' for each in unclear[:_NAMED])
            more = f" and {len(unclear) - _NAMED} more" if len(unclear) > _NAMED else ""
            reasons.append(
                f"Open are {names}{more}: measure longer, with a larger budget or fewer candidates."
            )
        return " ".join(reasons)

    def _fractions(self, components: Components) -> str:
        total = float(components.total[0])
        if not total > 0:
            return "not resolved from zero"
        percent = (100 * float(part[0]) / total for part in components[:3])
        named = zip(percent, self.statistics.parts, strict=True)
        return ", ".join(f"{value:.0f} % {name}" for value, name in named)

    def _nearest(self, rivals: list[MeasuredEstimator]) -> str:
        """Return what the candidate with the largest ECM would do."""
        best = max(rivals, key=lambda measured: measured.multiplier.estimate)
        removed = 1 - 1 / best.efficiency.estimate if best.efficiency.estimate > 0 else 0.0
        expected = best.predicted_speedup.estimate
        text = (
            f"Of the candidates {best.name} has the largest ECM, {best.multiplier.estimate:.2f}: "
            f"it removes {100 * max(removed, 0):.0f} % of the gradient variance, and its step "
            f"takes {best.seconds / self.current.seconds:.2f} times as long."
        )
        said = f"{expected:.2f} times less" if expected >= 1 else f"{1 / expected:.2f} times more"
        text += (
            f" The noise-ratio model of McCandlish et al. expects {said} compute for the same loss"
        )
        if self.noise_ratio < _NO_BOTTLENECK or expected < 1 < best.multiplier.estimate:
            text += (
                f", as noise is not what limits this training: the batch gradient has "
                f"{self.noise_ratio:.2g} times as much noise as signal"
            )
        return f"{text}."

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
                "second_repetitions": self.second_repetitions,
                "seconds": self.seconds,
                "budget": self.budget,
                "resamples": self.resamples,
                "cost": {name: x._asdict() for name, x in vars(self.cost).items()},
                "skipped": self.skipped,
                "estimators": [measured.to_dict() for measured in self.estimators],
                "noise_levels": self.statistics.noise_levels,
                "levels": self.statistics.levels._asdict(),
                "levels_error": self.statistics.levels_error._asdict(),
                "groups": ["all", *self.statistics.groups],
            }
        )
        return found


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
