"""What audits have found in the course of a training run."""

from typing import Any, ClassVar

from lightning_vr.auditing.comparison import Comparison
from lightning_vr.auditing.measured_estimator import MeasuredEstimator
from lightning_vr.auditing.result import LEAST_GAIN
from lightning_vr.lifecycle.curve_log import Row


class AuditHistory:
    """Findings of audits in plain numbers, as a checkpoint keeps them.

    Args:
        state: What ``state`` has returned, or None to start empty.
    """

    columns: ClassVar[list[str]] = [
        "candidate",
        "variance",
        "seconds",
        *(
            f"{name}{end}"
            for name in ("efficiency", "multiplier", "saving")
            for end in ("", "_low", "_high")
        ),
        "noise_ratio",
    ]

    def __init__(self, state: list[dict[str, Any]] | None = None) -> None:
        self._audits = list(state or [])

    def add(self, step: int, comparison: Comparison, found: list[MeasuredEstimator]) -> list[Row]:
        """Add what an audit at a step has found, and return its rows of a table."""
        ratio = comparison.noise_ratio
        savings = {
            each.name: (*each.predicted_speedup, (each.simultaneous or each.predicted_speedup).low)
            for each in found
        }
        self._audits.append({"step": step, "noise_ratio": ratio, "savings": savings})
        return [
            (
                each.name,
                float(each.components.total[0]),
                each.seconds,
                *each.efficiency,
                *each.multiplier,
                *each.predicted_speedup,
                ratio,
            )
            for each in found
        ]

    def __len__(self) -> int:
        return len(self._audits)

    def numbers(self) -> dict[str, float]:
        """Return what loggers get of the latest audit."""
        latest = self._audits[-1]
        savings = {f"audit/saving/{name}": x[0] for name, x in latest["savings"].items()}
        return {"audit/noise_ratio": latest["noise_ratio"], **savings}

    def summary(self) -> str:
        """Return what would have paid at the first audit and at the last, empty without any."""
        said = [self._said(audit) for audit in self._audits[:: max(1, len(self) - 1)][:2]]
        return f"What would have paid: {'; '.join(said)}." if said else ""

    def state(self) -> list[dict[str, Any]]:
        """Return everything."""
        return self._audits

    def _said(self, audit: dict[str, Any]) -> str:
        at = f"at step {audit['step']}, noise over signal {audit['noise_ratio']:.2g},"
        savings = audit["savings"]
        if not savings:
            return f"{at} nothing, as no candidate could be measured"
        name = max(savings, key=lambda each: savings[each][0])
        estimate, low, high, sure = savings[name]
        numbers = f"{estimate:.2f} times less compute ({low:.2f} to {high:.2f})"
        if sure > 1 and estimate >= LEAST_GAIN:
            return f"{at} {name}, with {numbers}"
        return f"{at} nothing for certain, {name} came nearest with {numbers}"
