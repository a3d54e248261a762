"""The diffusion loss: draws, target and control variate composed.

    loss = mean( weight · λ(t) · ‖x0_hat - target‖² / d + control variate )

per dimension d, so that its size does not depend on the resolution. The residual is formed in the
network's own space, where the squared error carries ``λ b²`` (``predictions.py``), in float32 or
better: at low noise x0_hat and the target agree to more digits than float32 has.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_vr.core.types import LossEstimate, Noised, TargetEstimate
from lightning_vr.estimators.slot import Slot
from lightning_vr.process.objective import Objective
from lightning_vr.process.predictions import Prediction
from lightning_vr.process.schedules import expand

Network = Callable[[Tensor, Noised], Tensor]
"""The raw network: ``(scaled x_t (B, *), noised) -> output (B, *)``."""


class ControlVariate(Slot, ABC):
    """A term of the loss whose gradient has mean zero.

    It calls the network itself, so that the draws and its own points can be one batch.
    """

    @abstractmethod
    def forward(
        self, network: Network, noised: Noised, target: TargetEstimate, objective: Objective
    ) -> tuple[Tensor, Tensor]:
        """Return the network's output at the draws, and the term of each draw.

        Args:
            network: The raw network; ``network_output`` calls it at draws.
            noised: The draws ``(B, *)``.
            target: The target of the regression.
            objective: The loss that is estimated.

        Returns:
            Output ``(B, *)`` as ``network_output`` returns it, and terms ``(B,)``, whose mean is
            added to the loss.
        """

    def draw(self, noised: Noised, generator: torch.Generator) -> Noised:
        """Draw the random numbers of the term, for given draws; without gradient."""
        return noised


def diffusion_loss(
    network: Network,
    noised: Noised,
    target: TargetEstimate,
    objective: Objective,
    control_variate: ControlVariate | None = None,
) -> LossEstimate:
    """Return the weighted loss of each draw and its mean.

    Args:
        network: The raw network, called with ``x_t`` scaled as its prediction type requires.
        noised: The draws ``(B, *)``.
        target: The target of the regression.
        objective: The loss that is estimated.
        control_variate: A term with a zero-mean gradient, or None. It is left out where gradients
            are disabled.
    """
    control, coefficients = None, _coefficients(noised, objective)
    if control_variate is None or not torch.is_grad_enabled():
        output = _output(network, noised, coefficients)
    else:
        output, control = control_variate(network, noised, target, objective)
    residual = output - coefficients.output(noised.x0, noised.noise, target.x0)
    per_draw = loss_weight(noised, objective) * residual.flatten(1).square().mean(dim=1)
    loss = per_draw.mean() if control is None else (per_draw + control).mean()
    return LossEstimate(loss, per_draw, noised, target, control)


def network_output(network: Network, noised: Noised, objective: Objective) -> Tensor:
    """Return the raw network's output ``(B, *)``, in float32 or better."""
    return _output(network, noised, _coefficients(noised, objective))


def loss_weight(noised: Noised, objective: Objective) -> Tensor:
    """Return the weight of each draw on the squared error of the network's output ``(B,)``."""
    if noised.loss_weight is not None:
        return noised.loss_weight
    return noised.weight * objective.weight(noised.t, (noised.alpha, noised.sigma))


def denoise(network: Network, noised: Noised, objective: Objective) -> Tensor:
    """Return x0_hat ``(B, *)``, in float32 or better."""
    coefficients = _coefficients(noised, objective)
    return coefficients.x0_hat(noised.xt, _output(network, noised, coefficients))


def _coefficients(noised: Noised, objective: Objective) -> Prediction:
    return objective.coefficients(noised.t, (noised.alpha, noised.sigma))


def _output(network: Network, noised: Noised, coefficients: Prediction) -> Tensor:
    scaled = expand(coefficients.input_scale, noised.xt) * noised.xt
    return network(scaled, noised).to(noised.xt.dtype)
