"""The audit of a module: a trainer measures instead of training."""

import copy
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer

from lightning_vr.auditing.before_training import measure_before_training
from lightning_vr.auditing.candidates import Candidate, check_candidates
from lightning_vr.auditing.measurement import AuditMeasurement
from lightning_vr.auditing.result import Audit
from lightning_vr.core.validation import check_positive
from lightning_vr.training.estimator_module import EstimatorModule


def audit(
    module: EstimatorModule,
    datamodule: LightningDataModule,
    candidates: list[Candidate] | None = None,
    *,
    budget: float = 120.0,
    trainer: Trainer | None = None,
    progress: bool = True,
) -> Audit:
    """Measure what the module's estimator and its rivals cost and save, at its present weights.

    Neither the module nor the global random state is changed, also if the audit fails. Draws that
    learn are measured as they are in the middle of training: a proposal has seen batches, and
    ``resamples="auto"`` takes the K that its pilot chooses here. The module's own draws keep what
    they have learned in training; if they have not learned yet, a copy of them learns. The same
    holds for control variates, which are fitted on separate batches. Where the gate stays closed
    nothing is measured, and the result says so.

    Args:
        module: The module to audit: a ``DiffusionModule``, a ``ScoreDistillation`` or a
            ``DistributionMatching``, whose student is audited.
        datamodule: Its training data.
        candidates: What to compare with, the most promising first; by default the estimators of
            this package.
        budget: Seconds to spend. Where it is too small for the least repetitions of all candidates,
            the last ones are dropped, and named in the result. It is exceeded only if those of the
            first three, or preparation, need more; the audit says so after its first repetition.
        trainer: Gives device, precision and ranks; by default a new one on this machine. Its
            callbacks are not run, and it cannot be used again.
        progress: Whether to show a progress bar.

    Raises:
        MisconfigurationException: If the module has no estimators to exchange, or the trainer
            starts its processes by fork or spawn.
        ValueError: If the budget is not positive and finite, a candidate fills no slot or one that
            the module lacks, names repeat, or an epoch has fewer than two whole batches.
    """
    _check(module, candidates, budget)

    def measure(trainer: Trainer, module: EstimatorModule) -> Audit:
        # slots learn, but the module's own must not
        learning = {"draws", "control_variate"} & set(module.estimator_slots)
        own = {name: copy.deepcopy(getattr(module, name)) for name in learning}
        with Candidate("own", **own).in_place(module):
            return AuditMeasurement(trainer, module, candidates, budget, progress).measure()

    return measure_before_training(measure, module, datamodule, trainer)


def _check(module: Any, candidates: list[Candidate] | None, budget: float) -> None:
    check_positive("budget", budget)
    if not isinstance(module, EstimatorModule):
        raise MisconfigurationException(
            f"`module` must be a DiffusionModule, ScoreDistillation or DistributionMatching, whose "
            f"estimators can be exchanged, got a {type(module).__name__}: measure it with the "
            f"callback GradientVariance."
        )
    check_candidates(candidates or [], module)
