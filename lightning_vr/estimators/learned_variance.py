r"""A learned variance of the reverse process, as a term of the loss.

Nichol and Dhariwal 2021, arXiv 2102.09672, section 3.1: a network of twice the channels says in
its second half which variance each reverse step has (``process/reverse_steps.py``), and learns it
from the variational bound,

    L_hybrid = L_simple + weight · L_vlb,        L_vlb = Σ_t L_t = T E_{t ~ uniform}[ L_t ],

in bits per dimension, as in their code, where a factor of T/1000 on L_t is ``weight=0.001``. The
mean is stopped in L_vlb: the first half of the output has the gradient of L_simple alone, whatever
the weight. Importance weights p/q of the draws count for both terms, the weighting λ for L_simple.

**The term always has the plain target**, the sample x0 that was noised. The best variance is
``beta~ + c² Cov(x0 | x_t)``, where the covariance is what x0 does about its mean. A target such as
STF's is that mean: against it the residual of a good network is 0, and the variance would collapse
to beta~, the least there is. So STF lowers the noise of the mean's gradient, and the variance
learns from the same draws as it does without STF.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_vr.core.types import LossEstimate, Noised, TargetEstimate
from lightning_vr.core.validation import check_positive
from lightning_vr.estimators.draws import Draws
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.process.calling_conventions import configuration
from lightning_vr.process.network_calls import NetworkOutput
from lightning_vr.process.objective import Objective
from lightning_vr.process.pixel_levels import check_levels
from lightning_vr.process.reverse_steps import ReverseSteps, check_discrete
from lightning_vr.process.schedules import expand

NetworkWithVariance = Callable[[Tensor, Noised], NetworkOutput]
"""The raw network: ``(scaled x_t (B, *), noised) -> both halves of its output``."""


@dataclass(frozen=True)
class LearnedVariance:
    """Learns the variance of the reverse process by a network of twice the channels.

    It goes with all draws and targets, and adds no call of the network. Validation and tests log
    the loss with this term.

    Attributes:
        weight: Factor on the variational bound, in bits per dimension, beside the loss. It scales
            the gradient of the variance, and that of layers that it shares with the mean.
        levels: Number of values that a pixel has in [-1, 1], 256 for 8 bits, for the likelihood at
            the first step. By default the data is continuous, and its likelihood a normal density.
    """

    weight: float = 0.001
    levels: int | None = None

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)
        check_levels(self.levels)

    def loss(
        self,
        network: NetworkWithVariance,
        noised: Noised,
        target: TargetEstimate,
        objective: Objective,
    ) -> LossEstimate:
        """Return the loss of ``diffusion_loss`` and this term, from one call of the network.

        Args:
            network: The raw network.
            noised: The draws ``(B, *)``.
            target: The target of the mean's regression.
            objective: The loss that is estimated.
        """
        outputs: list[NetworkOutput] = []

        def mean(x: Tensor, noised: Noised) -> Tensor:
            outputs.append(network(x, noised))
            return outputs[0].mean

        found = diffusion_loss(mean, noised, target, objective)
        term = self.term(with_variance(outputs[0]), noised, objective)
        loss = (found.per_draw + term).mean()
        return LossEstimate(loss, found.per_draw, noised, target, found.control, term)

    def term(self, output: tuple[Tensor, Tensor], noised: Noised, objective: Objective) -> Tensor:
        """Return the weighted bound of each draw ``(B,)``.

        Args:
            output: Both halves of the network's output, each ``(B, *)``.
            noised: The draws; their x0 is the target.
            objective: The loss beside it.
        """
        mean, v = (part.to(noised.xt.dtype) for part in output)
        number = noised.t.round().long()
        all_steps = ReverseSteps.of(objective.schedule)
        steps, x0 = all_steps.at(number, noised.xt.dtype), noised.x0
        # in the network's own space, where nothing overflows at high noise
        coefficients = objective.coefficients(noised.t)
        residual = coefficients.output(x0, noised.noise, x0) - mean.detach()
        error = expand(steps.x0_scale * coefficients.b, x0) * residual
        bits = steps.bound(x0, error, steps.log_variance(x0, "learned", v), self.levels)
        return self.weight * len(all_steps.timesteps) * noised.weight * bits

    def check(self, objective: Objective, draws: Draws, network: nn.Module) -> None:
        """Raise if the variance cannot be learned with this objective, draws or network.

        Raises:
            ValueError: If the schedule or the times are not discrete, if some time is never drawn,
                or if the network has other channels.
        """
        check_discrete(objective.schedule)
        steps = len(ReverseSteps.of(objective.schedule).timesteps)
        if objective.timesteps.steps != steps:
            raise ValueError(
                f"`timesteps` must be the {steps} timesteps of the scheduler with `variance`, as "
                f"the bound is a sum over them, got {type(objective.timesteps).__name__}: leave it "
                f"out."
            )
        proposal = getattr(draws, "proposal", None)
        if proposal is not None:
            h = proposal(objective, torch.device("cpu"))
            middles = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
            never = (h(middles) <= 0).nonzero()
            if len(never):
                raise ValueError(
                    f"`proposal` must be positive at every timestep with `variance`, whose bound "
                    f"is a sum over them, got a {type(proposal).__name__} that is zero at "
                    f"{int(never[0])}: mix in some of the base density."
                )
        config = configuration(network)
        channels, out = config.get("in_channels"), config.get("out_channels")
        if channels is not None and out is not None and out != 2 * channels:
            raise ValueError(
                f"`network` must have twice as many output as input channels with `variance`, got "
                f"a {type(network).__name__} of {channels} and {out}: set out_channels to "
                f"{2 * channels}, or leave out `variance`."
            )


def with_variance(output: NetworkOutput) -> tuple[Tensor, Tensor]:
    """Return both halves of an output.

    Raises:
        ValueError: If it has no second half.
    """
    if output.variance is None:
        raise ValueError(
            "`network` must return twice the channels of its input for a learned variance, got as "
            "many: give it twice as many output channels, or leave the variance out."
        )
    return output.mean, output.variance
