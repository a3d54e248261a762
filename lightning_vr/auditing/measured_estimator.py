"""What was measured of one estimator."""

from dataclasses import dataclass
from typing import Any

from lightning_vr.variance.components import Components
from lightning_vr.variance.intervals import Interval


@dataclass(frozen=True)
class MeasuredEstimator:
    """What was measured of one estimator, in the second look alone if it was in it.

    Attributes:
        name: Its name; ``"current"`` for the module's own.
        components: Of the variance of the batch gradient, times the batch size.
        errors: Their standard errors.
        seconds: Of one training step.
        efficiency: Variance of the current estimator over its own, RE, with its 95 % interval.
        multiplier: Effective compute multiplier over the current estimator, ECM, with 95 %.
        predicted_speedup: How many times less compute it needs for the same loss, by the
            noise-ratio model, with 95 %. The ECM is this number where noise is the only bottleneck.
        simultaneous: The same with the interval that holds for all finalists at once with 95 %;
            None if it was not in the second look.
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
    predicted_speedup: Interval
    simultaneous: Interval | None = None
    config: dict[str, Any] | None = None
    draws_per_sample: int = 1

    @property
    def is_finalist(self) -> bool:
        """Whether it was measured again, on fresh draws."""
        return self.simultaneous is not None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers and tensors, by name."""
        simultaneous = self.simultaneous
        return {
            "name": self.name,
            "seconds": self.seconds,
            "config": self.config,
            "draws_per_sample": self.draws_per_sample,
            "components": self.components._asdict(),
            "errors": self.errors._asdict(),
            "efficiency": self.efficiency._asdict(),
            "multiplier": self.multiplier._asdict(),
            "predicted_speedup": self.predicted_speedup._asdict(),
            "simultaneous": None if simultaneous is None else simultaneous._asdict(),
        }
