"""Theory and measurement of variance: of the target, of the gradient, against its cost.

The room imports ``core``, ``process``, ``posterior`` and ``estimators``, and no Lightning.
"""

from lightning_vr.variance.accounting import CostModel
from lightning_vr.variance.bootstrap import Interval, bootstrap
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_measurement import GradientMeasurement, NoisyLoss
from lightning_vr.variance.target_measurement import measure_target_variance

__all__ = [
    "Components",
    "CostModel",
    "GradientMeasurement",
    "Interval",
    "NoisyLoss",
    "bootstrap",
    "measure_target_variance",
]
