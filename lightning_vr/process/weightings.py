"""Loss weights λ(t), stated once in x0 space: ``loss = λ ‖x0_hat - x0‖²``.

A weight that the literature states for a prediction type becomes a weight in x0 space through that
type's Jacobian b, ``λ = w / b²``: unit weight on epsilon is ``λ = alpha²/sigma² = 1/s²``, on x0
it is 1. One weight then means one objective whatever the network predicts. Many trainers got the
v-prediction of min-SNR wrong here.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_vr.core.validation import (
    check_at_least,
    check_choice,
    check_finite_number,
    check_positive,
)
from lightning_vr.process.predictions import PredictionType, squared_jacobian
from lightning_vr.process.schedules import Schedule

DistillationWeight = Literal["alpha_sigma2", "sigma2", "uniform"]


class Weighting(nn.Module, ABC):
    """A loss weight λ(t) in x0 space."""

    changes_objective: bool = False
    """Whether it is there to train another objective than unit weight on what is predicted."""

    @abstractmethod
    def forward(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Return λ at times ``t (B,)``, shape ``(B,)``."""

    def extra_repr(self) -> str:
        """Say whether the objective is another one."""
        return "changes the objective" if self.changes_objective else ""


class EDMWeighting(Weighting):
    """λ = (s² + sigma_data²) / (s sigma_data)²: unit weight on EDM's raw network output.

    Karras et al. 2022, arXiv 2206.00364, table 1. Written with ``s = sigma / alpha``, so it holds
    for every schedule.

    Args:
        sigma_data: Standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        check_positive("sigma_data", sigma_data)
        self.sigma_data = sigma_data

    def forward(self, schedule: Schedule, t: Tensor) -> Tensor:
        inverse_level = schedule.alpha(t) / schedule.sigma(t)
        return inverse_level**2 + self.sigma_data**-2


class MinSNRWeighting(Weighting):
    """λ = min(SNR, gamma) with SNR = alpha² / sigma² (Hang et al. 2023, arXiv 2303.09556).

    It changes the objective.

    Args:
        gamma: Largest weight; the paper uses 5.
    """

    changes_objective = True

    def __init__(self, gamma: float = 5.0) -> None:
        super().__init__()
        check_positive("gamma", gamma)
        self.gamma = gamma

    def forward(self, schedule: Schedule, t: Tensor) -> Tensor:
        return ((schedule.alpha(t) / schedule.sigma(t)) ** 2).clamp(max=self.gamma)


class SoftMinSNRWeighting(Weighting):
    """λ = SNR gamma / (SNR + gamma) = 1 / (s² + 1 / gamma), a smooth form of ``MinSNRWeighting``.

    It changes the objective. Crowson et al. 2024, arXiv 2401.11605; k-diffusion weighs the error of
    EDM's raw network by ``(s sigma_data)² / (s² + sigma_data²)²``, which is this λ with ``gamma = 1
    / sigma_data²``. Harmonic mean of SNR and gamma, but for a factor of 2.

    Args:
        gamma: Largest weight; 4 for data of standard deviation 0.5.
    """

    changes_objective = True

    def __init__(self, gamma: float = 4.0) -> None:
        super().__init__()
        check_positive("gamma", gamma)
        self.gamma = gamma

    def forward(self, schedule: Schedule, t: Tensor) -> Tensor:
        return 1 / (schedule.noise_level(t) ** 2 + 1 / self.gamma)


class P2Weighting(Weighting):
    """λ = SNR / (k + SNR)^gamma: unit weight on epsilon, less where little noise hides details.

    It changes the objective. Perception-prioritised weighting, Choi et al. 2022, arXiv 2204.00227;
    with ``gamma = 0`` it is unit weight on epsilon. SpeeD's published code uses it with k = 1 and
    gamma = 1 (arXiv 2405.17403).

    Args:
        k: Keeps the weight finite at high noise; the paper uses 1.
        gamma: How much details are suppressed; the paper uses 0.5 and 1.
    """

    changes_objective = True

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        check_positive("k", k)
        check_at_least("gamma", gamma, 0)
        check_finite_number("gamma", gamma)
        self.k, self.gamma = k, gamma

    def forward(self, schedule: Schedule, t: Tensor) -> Tensor:
        snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
        return snr / (self.k + snr) ** self.gamma


class UnitWeighting(Weighting):
    """Weight 1 on the squared error of one prediction type: λ = 1 / b².

    Args:
        prediction: The prediction type whose error counts equally at all times.
        sigma_data: Standard deviation of the data; for ``prediction="edm"`` only.
    """

    def __init__(self, prediction: PredictionType = "epsilon", sigma_data: float = 0.5) -> None:
        super().__init__()
        check_choice("prediction", prediction, get_args(PredictionType))
        check_positive("sigma_data", sigma_data)
        self.prediction = prediction
        self.sigma_data = sigma_data

    def forward(self, schedule: Schedule, t: Tensor) -> Tensor:
        return 1 / squared_jacobian(self.prediction, schedule, t, self.sigma_data)


class LogNormalWeighting(Weighting):
    """A bell over log noise level on top of unit epsilon weight: λ = N(log s; mean, std) / s².

    The noise levels in the middle, which decide the content of images, count most (Choi et al.
    2022, arXiv 2204.00227; Karras et al. 2022 put the same bell into the density of t instead). It
    changes the objective.

    Args:
        mean: Centre of the bell in log noise level.
        std: Width of the bell in log noise level.
    """

    changes_objective = True

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__()
        check_positive("std", std)
        check_finite_number("mean", mean)
        self.mean, self.std = mean, std

    def forward(self, schedule: Schedule, t: Tensor) -> Tensor:
        log_level = torch.log(schedule.sigma(t) / schedule.alpha(t))
        bell = torch.exp(-0.5 * ((log_level - self.mean) / self.std) ** 2)
        return bell / (self.std * math.sqrt(2 * math.pi)) * torch.exp(-2 * log_level)


class DistillationWeighting(Weighting):
    """The weight w(t) of score distillation on the noise residual: ``w (eps_hat - eps)``.

    In x0 space it is ``λ = w alpha² / sigma²``, so that ``λ b²`` of epsilon is w again.

    Args:
        weight: ``"alpha_sigma2"`` is ``alpha sigma²``: ``w = sigma²`` and the derivative ``alpha``
            of x_t, as DreamFusion derives it (Poole et al. 2022, arXiv 2209.14988, equation 3);
            ``"fantasia3d"`` of threestudio. ``"sigma2"`` is ``sigma²``, threestudio's ``"sds"``.
            ``"uniform"`` is 1.
    """

    def __init__(self, weight: DistillationWeight = "alpha_sigma2") -> None:
        super().__init__()
        check_choice("weight", weight, get_args(DistillationWeight))
        self.weight: DistillationWeight = weight

    def forward(self, schedule: Schedule, t: Tensor) -> Tensor:
        alpha = schedule.alpha(t)
        if self.weight == "alpha_sigma2":
            return alpha * alpha * alpha
        return alpha * alpha if self.weight == "sigma2" else (alpha / schedule.sigma(t)) ** 2
