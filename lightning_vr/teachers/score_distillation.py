"""ScoreDistillation: a scene that learns from a frozen teacher, as a LightningModule.

    batch → (views) → render → teacher's encode → K draws → teacher → one backward pass

The score distillation gradient (Poole et al. 2022, arXiv 2209.14988, equation 3) is estimated as in
``distillation.py``: the scene is rendered, encoded and differentiated once for each view, and the
teacher is asked at K draws.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_vr.core.distributed import rank, world_size
from lightning_vr.core.rng import generator
from lightning_vr.core.rows import detached
from lightning_vr.core.types import Clean, Noised, StepPart
from lightning_vr.core.validation import check_instance
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import Draws
from lightning_vr.estimators.proposals import WeightProposal
from lightning_vr.lifecycle.finite_guard import OnNonFinite
from lightning_vr.lifecycle.hyperparameters import describe_arguments
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.lifecycle.uncopied import Uncopied
from lightning_vr.lifecycle.weight_averaging import keep_learned
from lightning_vr.process.weightings import DistillationWeighting, Weighting
from lightning_vr.teachers.distillation import DistillationEstimate, check_distillation, distill
from lightning_vr.teachers.distillation_pilot import DistillationPilot
from lightning_vr.teachers.frozen_teacher import FrozenTeacher
from lightning_vr.teachers.noisy_distillation import NoisyDistillation
from lightning_vr.teachers.orbit_views import OrbitViews, ViewBatch
from lightning_vr.teachers.time_range import TimeRange
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.monitors import MonitoredSchedules
from lightning_vr.training.noisy_losses import Precision
from lightning_vr.training.resamples_pilot import ResamplesPilot
from lightning_vr.training.training_checks import check_ranks
from lightning_vr.variance.components import PARTS

_NUMBERS = ("gradient_norm", "residual_norm", "largest_weight")


class ScoreDistillation(TimeRange, MonitoredSchedules, EstimatorModule):
    """Trains what ``render`` renders from by the scores of a frozen teacher.

    Override ``render``, or give an ``upstream``. Loggers get ``train/loss``, which is half of the
    mean squared norm of the gradient by a view, ``train/gradient_norm``, ``train/residual_norm``
    and ``train/largest_weight``.

    Args:
        teacher: The teacher. It is in no checkpoint: give it again when one is loaded.
        upstream: Renders a batch, unless ``render`` is overridden.
        draws: Times and noise; by default 8 of each view in 4 strata of the weight, each with noise
            of both signs. ``CARV("auto")`` chooses K by pilots while it trains.
        weighting: The weight w(t), stated as a loss weight; ``DistillationWeighting()``, which is
            ``alpha sigma²``, if not given.
        time_range: Quantiles of the teacher's times between which t is drawn.
        views: Views to draw for each batch, which ``render`` then gets as a ``ViewBatch``.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule, over optimizer steps, from the optimizer.
        on_nonfinite: What to do where something is not finite: ``"raise"``, or ``"skip"`` the step.

    Attributes:
        estimate: The latest estimate and its parts, without gradient.

    Raises:
        ValueError: If the draws would give a biased estimate.
    """

    estimator_slots = ("draws", "views")
    variance_parts = ("view", *PARTS[1:])
    resamples_pilot = DistillationPilot

    logged = tuple(f"train/{name}" for name in _NUMBERS)

    def __init__(
        self,
        teacher: FrozenTeacher,
        upstream: nn.Module | None = None,
        draws: Draws | None = None,
        weighting: Weighting | None = None,
        time_range: tuple[float, float] = (0.02, 0.98),
        views: OrbitViews | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        super().__init__()
        check_instance("teacher", teacher, FrozenTeacher, "FrozenTeacher(network, schedule)")
        self.teacher, self.upstream, self.views = teacher, upstream, views
        self.draws = draws or CARV(8, WeightProposal(), antithetic=True)
        self.weighting = weighting or DistillationWeighting()
        self._description = describe_arguments(self)
        self.optimizer = Uncopied(optimizer)
        self.lr_scheduler = None if lr_scheduler is None else Uncopied(lr_scheduler)
        self.on_nonfinite = on_nonfinite
        self.time_range = time_range
        self.estimate: DistillationEstimate | None = None
        self._pilot: ResamplesPilot | None = None
        self.check_slots()

    def render(self, batch: Any) -> Clean | Tensor:
        """Return what a batch shows, with its graph; override it.

        Args:
            batch: What the loader gives, or a ``ViewBatch`` if the module draws views.

        Returns:
            Images in [-1, 1] ``(R, C, H, W)`` if the teacher has a ``vae``, else samples in its
            space, alone or as ``Clean`` with labels and a condition: see
            ``FrozenTeacher.noise_residual`` for negative ones.
        """
        if self.upstream is None:
            raise NotImplementedError(
                f"`{type(self).__name__}.render` must be overridden, or `upstream` given, to "
                f"render a batch."
            )
        found: Clean | Tensor = self.upstream(batch)
        return found

    def clean(self, batch: Any) -> Clean:
        """Render a batch, and encode it by the teacher.

        Views of a batch that has none yet are drawn from torch's global generator.
        """
        clean = self.rendered(batch).expanded()
        return replace(clean, x0=self.teacher.encode(clean.x0))

    def rendered(self, batch: Any) -> Clean:
        """Do what ``clean`` does, without the teacher's autoencoder."""
        if self.views is not None and not isinstance(batch, ViewBatch):
            seed = int(torch.randint(2**62, ()))
            batch = self.views.draw(generator(seed, "views", device=self.device), batch)
        found = self.render(batch)
        return found if isinstance(found, Clean) else Clean(found)

    def residual(self, noised: Noised) -> Tensor:
        """Return the direction of each draw ``(n, *)``: the teacher's noise residual."""
        return self.teacher.noise_residual(noised)

    def noisy_loss(self, precision: Precision = nullcontext) -> NoisyDistillation:
        return NoisyDistillation(self, precision)

    def check_slots(self) -> None:
        """Raise if the draws would give a biased estimate."""
        check_distillation(self.draws, self.objective)

    def prepare_training(self) -> None:
        """Make the pilot of draws that leave K open."""
        check_ranks(self.draws)
        self._pilot = self.make_resamples_pilot(RunContext.of(self.trainer))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one micro-step and keep its estimate for callbacks."""
        micro_steps = self.trainer.accumulate_grad_batches
        micro_step = batch_idx % micro_steps
        if self.views is not None:
            source = self.generator("views", self.global_step, micro_step)
            batch = self.views.draw(source, batch)
        if micro_step == 0 and self._pilot is not None:
            self._pilot.before_step(batch)
        strata = generator(self.run_seed, "strata", self.global_step, device=self.device)
        part = StepPart(rank() * micro_steps + micro_step, world_size() * micro_steps, strata)
        source = self.generator("train", self.global_step, micro_step)

        clean = self.clean(batch)
        estimate = distill(clean, self.residual, self.draws, self.objective, source, part)
        self.estimate = detached(estimate)
        self.draws.observe(self.estimate, self.objective)
        self._guard.add_draws(self.estimate, micro_step)
        numbers = {f"train/{name}": value for name, value in self.estimate.numbers().items()}
        self.log_dict(numbers, batch_size=len(clean.x0))
        return estimate.loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the draws learn from what all ranks have seen."""
        super().optimizer_step(*args, **kwargs)
        self.draws.advance()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what rebuilds the module, and what its draws have learned."""
        super().on_save_checkpoint(checkpoint)
        keep_learned(checkpoint)
        self._description.save(self, checkpoint)
