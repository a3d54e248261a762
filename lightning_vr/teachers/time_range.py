"""The times at which a teacher is asked, which a run may anneal, and the objective on them."""

from typing import ClassVar

from lightning_vr.process.objective import Objective
from lightning_vr.process.predictions import PredictionType
from lightning_vr.process.weightings import Weighting
from lightning_vr.teachers.frozen_teacher import FrozenTeacher


class TimeRange:
    """Gives a module with a ``teacher`` and a ``weighting`` its ``time_range`` and objective.

    Attributes:
        residual_space: In which space the residual is that is weighted.
    """

    residual_space: ClassVar[PredictionType] = "epsilon"

    teacher: FrozenTeacher
    weighting: Weighting
    _time_range: tuple[float, float]
    _objective: Objective

    @property
    def time_range(self) -> tuple[float, float]:
        """Quantiles of the teacher's times between which t is drawn; may be annealed."""
        return self._time_range

    @time_range.setter
    def time_range(self, bounds: tuple[float, float]) -> None:
        # a proposal keeps the table of an objective as long as that is the same
        self._objective = self.teacher.objective(self.weighting, bounds, self.residual_space)
        self._time_range = bounds

    @property
    def objective(self) -> Objective:
        """What the draws are an expectation of."""
        self.teacher.model  # noqa: B018  # moves the schedule to the teacher's device
        return self._objective
