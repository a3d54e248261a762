"""The uncertainty weighting of EDM2: each noise level counts alike, whatever its loss is.

EDM2 learns ``u(s)`` beside the network by the loss ``λ E‖x0_hat - x0‖² / e^u + u`` (Karras et al.
2024, arXiv 2312.02696, after Kendall et al. 2018, arXiv 1705.07115). For a given network that is
least where ``e^u`` is the weighted loss at s itself, so that the weight becomes

    λ(s) / L(s),      L(s) = λ(s) E ‖x0_hat - x0‖² / d.

EDM2 adapts u while it trains; here L is fixed, from losses that were measured before, so that the
objective stands still and losses of different steps can be compared.
"""

from collections.abc import Sequence

from torch import Tensor

from lightning_vr.process.noise_level_table import NoiseLevelTable
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.weightings import Weighting


class UncertaintyWeighting(Weighting):
    """λ = d / E‖x0_hat - x0‖², by mean squared errors that were measured at noise levels.

    The weight that the losses were measured with cancels. It changes the objective.

    Args:
        noise_levels: Increasing noise levels ``(L,)``; beyond them the ratio of the error to ``s² /
            (1 + s²)`` stays that of the nearer end.
        errors: Mean squared error of x0_hat per dimension at each ``(L,)``, positive.
    """

    changes_objective = True

    def __init__(self, noise_levels: Sequence[float], errors: Sequence[float]) -> None:
        super().__init__()
        if errors and min(errors) <= 0:
            raise ValueError(
                f"`errors` must be positive, as the weight is one over them, got {[*errors]}: "
                f"leave out noise levels without an error."
            )
        NoiseLevelTable(noise_levels, errors)  # raises before anything is divided
        ratios = [x * (1 + s**-2) for x, s in zip(errors, noise_levels, strict=True)]
        self.table = NoiseLevelTable(noise_levels, ratios)
        self.noise_levels, self.errors = [*noise_levels], [*errors]

    def forward(self, schedule: Schedule, t: Tensor) -> Tensor:
        level = schedule.noise_level(t)
        return (1 + level**-2) / self.table(level)
