"""Times with importance weights, strata and antithetic pairs, for a loop with any corruption.

The draws of ``CARV`` for losses that are no ``Objective``, such as that of a masked language model:

    E_{t ~ p, u} [ loss(x0, corruption(u, t), t) ] ≈ mean of  weight · loss,    weight = p/q.

Antithetic pairs have one time, and uniform numbers u and 1 - u. Where a token is masked if u < t,
the two masks are as complementary as t allows: at t = 1/2 one masks what the other shows (MIRROR:
Jia et al. 2025, arXiv 2511.18159; Owen 2013, "Monte Carlo theory, methods and examples", section
8.2). Each draw has the density q and uniform u: the estimate is unbiased for all combinations.

At equal numbers of draws a pair pays only if its noise is anticorrelated enough to make up for half
as many samples: if ρ V_noise < -(V_data + V_time), with ρ the correlation of a pair's noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_vr.core.types import WHOLE_STEP, StepPart, Times
from lightning_vr.core.validation import check_integer
from lightning_vr.estimators.carv import stratify
from lightning_vr.estimators.draws import open_uniform
from lightning_vr.estimators.proposals import Proposal, draw_times
from lightning_vr.process.timesteps import Density, Uniform

_LEAST = 2.0**-24
"""The smallest uniform number: 1 minus it is below 1 in float32 too."""


@dataclass(frozen=True)
class _Weighted:
    """A density of times and a weight, as proposals ask for them."""

    timesteps: Density
    function: Callable[[Tensor], Tensor] | None
    parent: None = None

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t) if self.function is None else self.function(t)


class TimestepSampler(nn.Module):
    """Draws times for a training loop of any kind, and learns where to draw them.

    It is a module, so that what a proposal learns is in the checkpoint::

        times = TimestepSampler(Uniform(0.01, 1), LearnedProposal())
        for x0 in loader:
            t, weight, _ = times.draw(len(x0), generator)
            mask = times.uniforms(x0.shape, generator) < t[:, None]
            losses, squared = loss_of_each(x0, mask, t)
            (weight * losses).mean().backward()
            times.observe(t, squared)
            optimizer.step()
            times.advance()

    Args:
        density: Density p(t) of the loss; uniform on (0, 1) if not given.
        proposal: Density q to draw times from; p if not given.
        strata: Whether each of n draws is in one of n equally likely parts of q, in random order.
        antithetic: Whether draws 2i and 2i + 1 are a pair, with one time and u and 1 - u. A pair
            should have one sample: repeat each.
        weight: The weight of the loss as a function of t, for ``WeightProposal``; 1 if not given.

    Raises:
        ValueError: If the proposal is zero where the weighted loss is not.
    """

    def __init__(
        self,
        density: Density | None = None,
        proposal: Proposal | None = None,
        strata: bool = True,
        antithetic: bool = False,
        weight: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.density = Uniform() if density is None else density
        self.proposal = proposal
        self.strata, self.antithetic, self.weight = strata, antithetic, weight
        self._objective = _Weighted(self.density, weight)
        if proposal is not None:
            proposal.check(self._objective)

    def draw(self, count: int, generator: torch.Generator, part: StepPart = WHOLE_STEP) -> Times:
        """Draw times for one batch, on the device of the generator.

        Args:
            count: Number of draws; even with antithetic pairs.
            generator: Source of the randomness that parts of a step do not share.
            part: The part of an optimizer step that the batch is, for strata over all of it.

        Returns:
            ``t`` and ``weight``, which is p/q, each ``(count,)`` in float32.

        Raises:
            ValueError: If ``count`` is not positive, or odd with antithetic pairs.
        """
        check_integer("count", count, 1)
        copies = self._copies(count, "count")
        u = open_uniform(count // copies, generator)[:, None]
        u = stratify(u, "global" if self.strata else "none", part, generator)
        return draw_times(u.flatten().repeat_interleave(copies), self._objective, self.proposal)

    def uniforms(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return uniform numbers in the open interval (0, 1), in pairs u and 1 - u if antithetic.

        Args:
            shape: Their shape ``(count, *)``, such as that of tokens.
            generator: Source of the randomness.

        Raises:
            ValueError: If ``count`` is odd with antithetic pairs.
        """
        count, *rest = shape
        copies = self._copies(count, "shape[0]")
        u = torch.rand(count // copies, *rest, generator=generator, device=generator.device)
        u = u.clamp(min=_LEAST)
        return torch.stack([u, 1 - u], dim=1).flatten(0, 1) if copies == 2 else u

    def observe(self, t: Tensor, squared: Tensor) -> None:
        """Observe draws, for a proposal that learns.

        Args:
            t: Their times ``(n,)``.
            squared: Squared size of the gradient of each draw's loss ``(n,)``, without its
                importance weight: by the parameters, or in its place by the network's output; or
                the squared loss. The ``moment`` of a ``LearnedProposal`` plays no part here.

        Raises:
            ValueError: If the shapes differ.
        """
        if t.shape != squared.shape or t.ndim != 1:
            raise ValueError(
                f"`squared` must have one number for each of the times, of shape "
                f"{tuple(t.shape)}, got {tuple(squared.shape)}: sum over all dimensions but the "
                f"first."
            )
        if self.proposal is not None:
            self.proposal.observe_moment(self.density.cdf(t.double()), squared.detach())

    def advance(self) -> None:
        """Learn from what all ranks have observed; all must call it, after the optimizer step."""
        if self.proposal is not None:
            self.proposal.advance()

    def _copies(self, count: int, name: str) -> int:
        if self.antithetic and count % 2:
            raise ValueError(
                f"`{name}` must be even with antithetic pairs, got {count}: repeat each sample, or "
                f"use antithetic=False."
            )
        return 2 if self.antithetic else 1
