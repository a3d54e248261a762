"""What each estimator would save, measured before training with it.

    python -m lightning_vr audit --config configs/digits_dsm.yaml
    audit(module, datamodule).advice
    Trainer(callbacks=[AuditDuringTraining()])

The module's estimator and its rivals run side by side, at one set of weights and on the same
batches, times and noise. Measured are the variance of the batch gradient by its source, the seconds
of a training step, and the effective compute multiplier that follows, with a confidence interval.

``error_budget`` measures, at one set of weights too, what a module's sampler gets wrong and why.

The room imports ``callbacks`` and every floor below.
"""

from lightning_vr.auditing.audit_during_training import AuditDuringTraining
from lightning_vr.auditing.candidates import Candidate
from lightning_vr.auditing.error_budget_report import save as save_error_budget
from lightning_vr.auditing.report import save as save_report
from lightning_vr.auditing.result import Audit
from lightning_vr.auditing.run import audit
from lightning_vr.auditing.sampling_errors import SamplingErrors, error_budget

__all__ = [
    "Audit",
    "AuditDuringTraining",
    "Candidate",
    "SamplingErrors",
    "audit",
    "error_budget",
    "save_error_budget",
    "save_report",
]
