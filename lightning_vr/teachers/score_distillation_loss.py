"""Score distillation for loops of one's own: a module that gives a loss to differentiate.

    ∇ = E_{t, noise} [ w(t) (eps_hat(x_t) - noise) dx/dθ ]

(DreamFusion, Poole et al. 2022, arXiv 2209.14988, equation 3), estimated by ``distill``.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vr.core.conditions import Condition
from lightning_vr.core.distributed import rank
from lightning_vr.core.rng import generator
from lightning_vr.core.types import WHOLE_STEP, Clean, StepPart
from lightning_vr.core.validation import check_instance
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import Draws
from lightning_vr.estimators.proposals import WeightProposal
from lightning_vr.process.weightings import DistillationWeighting, Weighting
from lightning_vr.teachers.distillation import (
    DistillationEstimate,
    Residual,
    check_distillation,
    distill,
)
from lightning_vr.teachers.frozen_teacher import FrozenTeacher
from lightning_vr.teachers.time_range import TimeRange


class ScoreDistillationLoss(TimeRange, nn.Module):
    """The score distillation loss of rendered samples.

    Example::

        teacher = FrozenTeacher.from_pretrained("sd21", guidance=101.0, dtype="float16")
        sds = ScoreDistillationLoss(teacher)
        text = {"encoder_hidden_states": prompt, "negative_encoder_hidden_states": negative}
        for cameras in views:
            latents = teacher.encode(2 * rasterize(splats, cameras) - 1)
            optimizer.zero_grad()
            sds(latents, cond=text).loss.backward()
            optimizer.step()
            sds.advance()

    Args:
        teacher: The teacher.
        draws: Times and noise; by default 8 of each sample in 4 strata of the weight, each with
            noise of both signs.
        weighting: The weight w(t), stated as a loss weight; ``DistillationWeighting()``, which is
            ``alpha sigma²``, if not given.
        time_range: Quantiles of the teacher's times between which t is drawn.
        residual: A direction in place of the teacher's noise residual, in its unit.
        seed: Seed of the draws; ranks draw different ones.

    Attributes:
        calls: Number of calls so far, by which draws are keyed.
        time_range: May be changed at any time, as some anneal it.

    Raises:
        ValueError: If the draws leave K open, or would give a biased estimate.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        draws: Draws | None = None,
        weighting: Weighting | None = None,
        time_range: tuple[float, float] = (0.02, 0.98),
        *,
        residual: Residual | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_instance("teacher", teacher, FrozenTeacher, "FrozenTeacher(network, schedule)")
        self.teacher = teacher
        self.draws = draws or CARV(8, WeightProposal(), antithetic=True)
        self.weighting = weighting or DistillationWeighting()
        self.residual = residual or teacher.noise_residual
        self.seed, self.calls = seed, 0
        self.time_range = time_range
        check_distillation(self.draws, self.objective, type(self).__name__)

    def forward(
        self,
        x0: Tensor | Clean,
        *,
        group: Tensor | None = None,
        cond: Condition | None = None,
        source: torch.Generator | None = None,
        part: StepPart = WHOLE_STEP,
    ) -> DistillationEstimate:
        """Return the estimate, and let the proposal see it.

        Args:
            x0: Samples with their graph ``(R, *)``, in the teacher's space, or all of it as
                ``Clean``.
            group: Class labels ``(R,)``.
            cond: Condition, with one row for all or R rows; see ``FrozenTeacher.noise_residual``
                for negative ones.
            source: Generator of all randomness; that of this call if not given.
            part: The part of an optimizer step that the samples are.

        Raises:
            ValueError: If samples have no graph, or if something is not finite.
        """
        clean = x0 if isinstance(x0, Clean) else Clean(x0, group, cond)
        if source is None:
            key = ("distillation", self.calls)
            source = generator(self.seed, rank(), *key, device=clean.x0.device)
        vars(self)["calls"] += 1  # a module takes longer to set an attribute
        objective = self._objective  # the residual moves the teacher to its device
        found = distill(clean, self.residual, self.draws, objective, source, part)
        if not math.isfinite(found.loss.item()):
            what = "`x0`" if not bool(clean.x0.isfinite().all()) else "the teacher's residual"
            raise ValueError(
                f"The score distillation loss must be finite, but {what} is not: lower the "
                f"learning rate, or give the teacher more precision."
            )
        if torch.is_grad_enabled():
            self.draws.observe(found, objective)
        return found

    def advance(self) -> None:
        """Let the proposal learn; call it after each optimizer step, on all ranks."""
        self.draws.advance()

    def get_extra_state(self) -> dict[str, Any]:
        """Return where the draws stand, for a checkpoint."""
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with the draws of a checkpoint."""
        self.calls = int(state["calls"])
