"""CARV: hierarchical draws of times and noise that amortize an expensive upstream.

An expensive ``encode`` runs once for each of R samples, and each sample is noised K times:

    ĝ = 1/R Σ_r 1/K Σ_k w(t_rk) g(x_r, t_rk, noise_rk),      w = p/q,
    Var ĝ = (V_B + V_W / K) / R,

with V_B between samples and V_W within one (Bettencourt, Wu, Atzmon, Lucas and Lorraine 2026, arXiv
2605.21489, equations 5, 13, 14, 15 and 17). Three things lower V_W at no cost in time:

* times from a proposal q (``proposals.py``);
* jittered strata, ``u = (k + ξ)/K`` with independent ξ: one draw in each of K equally likely parts
  of q, for every sample, for the whole optimizer step, or for both at once (a Latin hypercube);
* antithetic pairs of noise, ``±ε`` at one time, which cancel what is odd in ε (Owen 2013, "Monte
  Carlo theory, methods and examples", section 8.2), for half as many times.

Averaged over the strata each draw has the density q, all draws have equal weight, and importance
weights are plain: the estimate is unbiased for all combinations.
"""

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_vr.core.types import WHOLE_STEP, Clean, DrawEstimate, Noised, StepPart, Times
from lightning_vr.core.validation import check_at_least, check_choice
from lightning_vr.estimators.draws import Draws, open_uniform
from lightning_vr.estimators.proposals import Proposal, draw_times
from lightning_vr.estimators.slot import warn_of_dropped_state
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import Schedule, expand

_MOST_RESAMPLES = 2**24
"""Strata between 0 and 1 that float32 can tell apart."""

Scope = Literal["auto", "none", "sample", "global", "nested"]


class CARV(Draws):
    """K resamples of each sample, stratified, importance-sampled and in antithetic pairs.

    Args:
        resamples: K, the number of draws of each sample. ``"auto"`` chooses the K of least variance
            times cost, which short pilots measure while training; that is 1 if ``encode`` is cheap.
        proposal: Density to draw times from; that of the loss if not given.
        scope: What the strata of times span. ``"none"``: independent times. ``"sample"``: the K
            draws of each sample. ``"global"``: all draws of an optimizer step, over ranks and
            accumulated batches. ``"nested"``: both at once. ``"auto"`` is ``"nested"``, which is
            ``"global"`` for one draw of each sample. If batches of a step differ in size, draws
            stay unbiased and strata are covered less evenly.
        antithetic: Whether draws are pairs with one time and opposite noise, so that each sample
            has K/2 times. Two numbers: only at noise levels sigma/alpha between them.
        chunk_size: Draws that pass through the network at a time, forward and backward, so that
            memory does not grow with K. If not given, all draws of a batch; with
            ``resamples="auto"`` on an accelerator, as many draws as samples.
        max_resamples: Largest K that ``"auto"`` may choose.
        pilot_every_n_steps: Optimizer steps from one pilot of ``"auto"`` to the next.

    Attributes:
        chosen: K that ``"auto"`` has chosen.
        pilot: Step and findings of its latest pilot, or None before the first.
    """

    def __init__(
        self,
        resamples: int | Literal["auto"] = "auto",
        proposal: Proposal | None = None,
        scope: Scope = "auto",
        antithetic: bool | tuple[float, float] = False,
        chunk_size: int | None = None,
        max_resamples: int = 16,
        pilot_every_n_steps: int = 1000,
    ) -> None:
        super().__init__()
        _check_arguments(resamples, antithetic, max_resamples)
        check_choice("scope", scope, get_args(Scope))
        check_at_least("chunk_size", 1 if chunk_size is None else chunk_size, 1)
        check_at_least("pilot_every_n_steps", pilot_every_n_steps, 1)
        self.resamples = resamples
        self.proposal = proposal
        self.scope: Scope = scope
        self.antithetic = antithetic
        self.chunk_size = chunk_size
        self.max_resamples = max_resamples
        self.pilot_every_n_steps = pilot_every_n_steps
        self.chosen = self.least_resamples
        self.pilot: dict[str, float] | None = None

    @property
    def least_resamples(self) -> int:
        """Smallest possible number of draws of a sample."""
        return 2 if self.antithetic else 1

    @property
    def draws_per_sample(self) -> int:
        return self.chosen if self.resamples == "auto" else self.resamples

    @property
    def couples_rows(self) -> bool:
        return self.scope in ("auto", "global", "nested")

    def chunk(self, draws: int, device: torch.device) -> int:
        if self.chunk_size is None and self.resamples == "auto" and device.type != "cpu":
            return max(1, draws // self.draws_per_sample)
        return self.chunk_size or draws

    def times(
        self,
        clean: Clean,
        objective: Objective,
        generator: torch.Generator,
        part: StepPart = WHOLE_STEP,
    ) -> Times:
        copies = self.least_resamples
        count = self.draws_per_sample // copies
        u = open_uniform(len(clean.x0) * count, generator).reshape(-1, count)
        u = stratify(u, self.scope, part, generator).flatten()
        if copies > 1:
            u = u.repeat_interleave(copies)
        return draw_times(u, objective, self.proposal)

    def noise(
        self, clean: Clean, schedule: Schedule, times: Times, generator: torch.Generator
    ) -> Noised:
        noised = super().noise(clean, schedule, times, generator)
        if self.antithetic is False:
            return noised
        low, high = (0.0, math.inf) if self.antithetic is True else self.antithetic
        first, second, level = noised.noise[::2], noised.noise[1::2], noised.noise_level[::2]
        second = torch.where(expand((level >= low) & (level <= high), first), -first, second)
        noise = torch.stack([first, second], dim=1).flatten(0, 1)
        xt = schedule.perturb(noised.x0, noise, noised.t)
        return replace(noised, noise=noise, xt=xt)

    def check(self, objective: Objective) -> None:
        if self.proposal is not None:
            self.proposal.check(objective)

    def observe(self, estimate: DrawEstimate, objective: Objective) -> None:
        if self.proposal is not None:
            noised = estimate.noised
            v, weight = objective.timesteps.cdf(noised.t.double()), objective.weight(noised.t)
            bound = None if estimate.bound is None else estimate.bound / noised.weight
            self.proposal.observe(v, weight, estimate.per_draw / noised.weight, bound)

    def advance(self) -> None:
        if self.proposal is not None:
            self.proposal.advance()

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the pilots have found, for the checkpoint."""
        return {"chosen": self.chosen, "pilot": self.pilot}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load what the pilots of a checkpoint have found; K stays within today's bounds."""
        least, chosen = self.least_resamples, min(state["chosen"], self.max_resamples)
        self.chosen, self.pilot = max(least, chosen // least * least), state["pilot"]
        if self.resamples == "auto" and self.chosen != state["chosen"]:
            warn_of_dropped_state(
                f"CARV: the checkpoint's pilots chose K = {state['chosen']}, which is not between "
                f"{least} and {self.max_resamples}, or not even with antithetic pairs: K = "
                f"{self.chosen} until the next pilot."
            )


def stratify(u: Tensor, scope: Scope, part: StepPart, generator: torch.Generator) -> Tensor:
    """Move independent uniform numbers into strata.

    Args:
        u: Uniform numbers ``(B, K)``.
        scope: What the strata span.
        part: The part of an optimizer step that the B samples are.
        generator: Source of the order of strata, if a step has only one part.

    Returns:
        Uniform numbers ``(B, K)``, one in each stratum.
    """
    if scope == "none":
        return u
    samples, count = u.shape
    strata = torch.arange(count, dtype=u.dtype, device=u.device)
    if scope == "sample":
        found = (strata + u) / count
    else:
        shared, total = part.shared or generator, samples * part.count
        own = slice(samples * part.number, samples * (part.number + 1))
        shape = (total * count, 1) if scope == "global" else (total, count)
        # each column is permuted: a sample's stratum must not follow from its place in the data
        numbers = torch.rand(shape, generator=shared, device=u.device, dtype=torch.float32)
        # float32 numbers tie in large steps, and ranks must order ties alike
        order = numbers.argsort(dim=0, stable=True)
        if scope == "global":
            found = (order.reshape(total, count)[own] + u) / (total * count)
        else:
            found = (strata + (order[own] + u) / total) / count
    return found.clamp(max=1 - 2.0**-53)


def _check_arguments(
    resamples: int | str, antithetic: bool | tuple[float, float], largest: int
) -> None:
    is_number = isinstance(resamples, int) and not isinstance(resamples, bool) and resamples >= 1
    if resamples != "auto" and not is_number:
        raise ValueError(
            f"`resamples` must be 'auto' or a number of 1 or more, got {resamples!r}: use 'auto', "
            f"or 1 for one draw of each sample."
        )
    check_at_least("max_resamples", largest, 2 if antithetic else 1)
    for name, count in (("resamples", resamples), ("max_resamples", largest)):
        if isinstance(count, int) and count > _MOST_RESAMPLES:
            raise ValueError(
                f"`{name}` must be at most {_MOST_RESAMPLES}, as times in float32 have no more "
                f"strata, got {count}: use a number such as 4."
            )
    if antithetic and is_number and int(resamples) % 2:
        raise ValueError(
            f"`resamples` must be even with antithetic pairs, got {resamples}: use "
            f"{int(resamples) + 1}, or antithetic=False."
        )
    if not isinstance(antithetic, bool):
        low, high = antithetic
        if not 0 <= low < high or math.isnan(high):
            raise ValueError(
                f"`antithetic` must be True, False or two noise levels (low, high) with 0 <= low < "
                f"high, got {antithetic}: use True for pairs at all noise levels."
            )
