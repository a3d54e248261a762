"""At which optimizer steps a callback measures, so that measuring takes little of the time."""

import math

from lightning.pytorch.utilities import rank_zero_warn

from lightning_vr.core.validation import check_at_least

TIME_BUDGET = 0.02
"""Fraction of the training time that measuring may take by default."""


class Cadence:
    """One optimizer step in so many is measured, the first after half as many.

    Args:
        every_n_steps: How many; by default as many as keep measuring at 2 % of the time.

    Attributes:
        every: How many there are, once the cost of a measurement is known.
        period: Number of the last measurement, which a checkpoint keeps.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None:
            check_at_least("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.every = 1
        self.period = 0

    def set_cost(self, cost: float) -> None:
        """Choose ``every`` by the number of training steps that one measurement costs."""
        self.every = self.every_n_steps or math.ceil(cost / TIME_BUDGET) or 1

    def is_due(self, step: int) -> bool:
        """Return whether a measurement is due before optimizer step ``step``."""
        # a step of manual optimization may count as several: none may stand for its period
        return self._period(step) not in (0, self.period)

    def mark(self, step: int) -> None:
        """Note that it was made."""
        self.period = self._period(step)

    def warn_of_none(self, callback: str, step: int) -> None:
        """Warn that a run has ended before its first measurement, unless each step is one.

        Args:
            callback: Name of the callback.
            step: Optimizer steps of the run.
        """
        if self.every > 1:
            rank_zero_warn(
                f"{callback} has measured nothing: it measures in about one step of {self.every}, "
                f"first after {self.every // 2}, and the run had {step}. Pass `every_n_steps` for "
                f"more."
            )

    def _period(self, step: int) -> int:
        return (step + self.every - self.every // 2) // self.every
