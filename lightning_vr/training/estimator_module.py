"""What audits and measurements of variance ask of a module whose gradient is an estimate."""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar

from lightning_vr.core.types import Clean, LossEstimate
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import Draws
from lightning_vr.lifecycle.resumable_module import ResumableModule
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.process.objective import Objective
from lightning_vr.training.noisy_losses import DrawnLoss, Precision
from lightning_vr.training.resamples_pilot import ResamplesPilot
from lightning_vr.variance.components import PARTS


class EstimatorModule(ResumableModule, ABC):
    """A module that trains by a gradient whose estimators can be exchanged.

    Attributes:
        estimator_slots: Names of the attributes that hold estimators; None in one means that it is
            left out.
        variance_parts: Names of what makes the gradient vary, outermost first.
        resamples_pilot: What chooses K for draws that leave it open.
        draws: Times and noise.
        estimate: The latest estimate of a training step, without gradient.
    """

    estimator_slots: ClassVar[tuple[str, ...]] = ("draws",)
    variance_parts: ClassVar[tuple[str, str, str]] = PARTS
    resamples_pilot: ClassVar[type[ResamplesPilot]] = ResamplesPilot

    draws: Draws
    estimate: LossEstimate | None

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """What the draws are an expectation of."""

    @abstractmethod
    def clean(self, batch: Any) -> Clean:
        """Return the clean samples that a training step on a batch would noise."""

    @abstractmethod
    def noisy_loss(self, precision: Precision = nullcontext) -> DrawnLoss:
        """Return the training loss with draws to draw again.

        Args:
            precision: The trainer's precision.
        """

    @abstractmethod
    def check_slots(self) -> None:
        """Raise if what is in the slots does not go together, or not with the module."""

    def make_resamples_pilot(self, run: RunContext) -> ResamplesPilot | None:
        """Return a pilot for draws that leave K open, else None.

        Args:
            run: The run that it trains in.
        """
        draws = self.draws
        if isinstance(draws, CARV) and draws.resamples == "auto":
            return self.resamples_pilot(self, draws, run, self.noisy_loss)
        return None

    def other_work(self, batch: Any) -> None:
        """Do what a step does beside the estimate and its optimizer, to be timed; keep nothing."""
