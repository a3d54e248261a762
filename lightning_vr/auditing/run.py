"""The audit of a module: a trainer measures instead of training."""

from lightning.pytorch import LightningDataModule, Trainer

from lightning_vr.auditing.before_training import measure_before_training
from lightning_vr.auditing.candidates import Candidate, check_candidates, check_exchangeable
from lightning_vr.auditing.measurement import AuditMeasurement
from lightning_vr.auditing.preparation import own_copies
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
    check_positive("budget", budget)
    check_exchangeable(module)
    check_candidates(candidates or [], module)

    def measure(trainer: Trainer, module: EstimatorModule) -> Audit:
        with own_copies(module).in_place(module):
            return AuditMeasurement(trainer, module, candidates, budget, progress).measure()

    return measure_before_training(measure, module, datamodule, trainer)
