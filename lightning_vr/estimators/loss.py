"""The diffusion loss: draws, target and control variate composed.

    loss = mean( weight · λ(t) · ‖x0_hat - target‖² / d ) + control variate

per dimension d, so that its size does not depend on the resolution. The residual is formed in the
network's own space, where the squared error carries ``λ b²`` (``predictions.py``), in float32 or
better: at low noise x0_hat and the target agree to more digits than float32 has.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from lightning_vr.estimators.slot import Slot
from lightning_vr.objective import Objective
from lightning_vr.schedules import expand
from lightning_vr.types import LossEstimate, Noised, TargetEstimate

Network = Callable[[Tensor, Noised], Tensor]
"""The raw network: ``(scaled x_t (B, *), noised) -> output (B, *)``."""


class ControlVariate(Slot, ABC):
    """A term of the loss whose gradient has mean zero."""

    @abstractmethod
    def forward(self, network: Network, noised: Noised, target: TargetEstimate) -> Tensor:
        """Return the term of each draw ``(B,)``; it is added to ``per_draw``."""


def diffusion_loss(
    network: Network,
    noised: Noised,
    target: TargetEstimate,
    objective: Objective,
    control_variate: ControlVariate | None = None,
) -> LossEstimate:
    """Return the weighted loss of each draw and its mean.

    Args:
        network: The raw network, called once with ``x_t`` scaled as its prediction asks.
        noised: The draws ``(B, *)``.
        target: What to regress on.
        objective: The loss that is estimated.
        control_variate: A term with a zero-mean gradient, or None.
    """
    coefficients = objective.coefficients(noised.t)
    output = network(expand(coefficients.input_scale, noised.xt) * noised.xt, noised)
    residual = output.to(noised.x0.dtype) - coefficients.output(noised.x0, noised.noise, target.x0)
    weight = noised.loss_weight
    if weight is None:
        weight = noised.weight * objective.weight(noised.t)
    per_draw = weight * residual.flatten(1).square().mean(dim=1)
    if control_variate is not None:
        per_draw = per_draw + control_variate(network, noised, target)
    return LossEstimate(per_draw.mean(), per_draw, noised, target)


def denoise(network: Network, noised: Noised, objective: Objective) -> Tensor:
    """Return x0_hat ``(B, *)``, in float32 or better."""
    coefficients = objective.coefficients(noised.t)
    output = network(expand(coefficients.input_scale, noised.xt) * noised.xt, noised)
    return coefficients.x0_hat(noised.xt, output.to(noised.xt.dtype))
