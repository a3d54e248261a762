"""Theory and measurement of variance: of the target, of the gradient, against its cost.

The room imports ``core``, ``process``, ``posterior`` and ``estimators``, and no Lightning.
"""

from lightning_vr.variance.accounting import CostModel, best_resamples, fixed_and_marginal
from lightning_vr.variance.components import Components
from lightning_vr.variance.convergence import ConvergenceMeasurement
from lightning_vr.variance.convergence_monitor import ConvergenceMonitor
from lightning_vr.variance.error_budget import ErrorBudget, measure_error_budgets
from lightning_vr.variance.gradient_measurement import GradientMeasurement, NoisyLoss
from lightning_vr.variance.intervals import Interval, jackknife
from lightning_vr.variance.nested_measurement import NestedMeasurement
from lightning_vr.variance.removed_variance import RemovedVariance
from lightning_vr.variance.target_measurement import measure_target_variance

__all__ = [
    "Components",
    "ConvergenceMeasurement",
    "ConvergenceMonitor",
    "CostModel",
    "ErrorBudget",
    "GradientMeasurement",
    "Interval",
    "NestedMeasurement",
    "NoisyLoss",
    "RemovedVariance",
    "best_resamples",
    "fixed_and_marginal",
    "jackknife",
    "measure_error_budgets",
    "measure_target_variance",
]
