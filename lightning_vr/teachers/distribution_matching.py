"""DistributionMatching: a one-step generator that learns from a frozen teacher.

A student makes samples x from noise in one step. The gradient of the divergence of their
distribution from the teacher's is the difference of two scores at noised samples, that of the
teacher and that of a fake model, which learns the student's distribution as it changes:

    ∇ = E_{z, t, noise} [ w(t) (x0_fake - x0_real) / mean|x - x0_real|  dx/dθ ]

(Yin et al. 2023, "One-step Diffusion with Distribution Matching Distillation", arXiv 2311.18828,
equations 7 and 8; the weight there is ``w = sigma²/alpha · alpha/sigma² = 1`` in x0 space). The
normaliser is part of the residual of each draw: the mean of normalised draws does not depend on
how many there are. It is at least ``sigma_data`` times the epsilon of float32, the smallest
difference that float32 resolves between samples of that size.

The gradient is estimated as in ``distillation.py``, with the student as the upstream. Draws of one
sample of the student cut the variance within it alone: at fixed noise z the variance falls as 1/K,
and in total it cannot fall below that between samples.

Two optimizers step in turn. Lightning's ``global_step`` and ``max_steps`` count the steps of both,
``fake_steps + 1`` for each batch; what is random is keyed on the module's own iteration.
"""

import copy
from contextlib import nullcontext
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_vr.core.conditions import Condition, expanded
from lightning_vr.core.devices import device_of
from lightning_vr.core.distributed import rank, world_size
from lightning_vr.core.rng import generator
from lightning_vr.core.rows import detached
from lightning_vr.core.sharding import whole_weights
from lightning_vr.core.types import Clean, LossEstimate, Noised, StepPart
from lightning_vr.core.validation import check_at_least
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import Draws
from lightning_vr.lifecycle.finite_guard import OnNonFinite
from lightning_vr.lifecycle.hyperparameters import describe_arguments
from lightning_vr.lifecycle.own_state import STATE
from lightning_vr.lifecycle.strategies import check_alternating_steps
from lightning_vr.lifecycle.uncopied import Uncopied
from lightning_vr.lifecycle.weight_averaging import keep_learned
from lightning_vr.process.sampling import evaluating
from lightning_vr.process.schedules import expand
from lightning_vr.process.weightings import UnitWeighting, Weighting
from lightning_vr.teachers.distillation import DistillationEstimate, check_distillation, distill
from lightning_vr.teachers.frozen_teacher import FrozenTeacher
from lightning_vr.teachers.guided_output import split_negative
from lightning_vr.teachers.noisy_distillation import NoisyDistillation
from lightning_vr.teachers.one_step_student import OneStepStudent
from lightning_vr.teachers.time_range import TimeRange
from lightning_vr.training import sample_arguments
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.noisy_losses import Precision
from lightning_vr.variance.components import PARTS


class DistributionMatching(TimeRange, EstimatorModule):
    """Trains a one-step student on the difference of a teacher's and a fake model's scores.

    Of a batch it takes the shape, the labels and the condition: the data itself plays no part.
    On several processes use ``strategy="ddp_find_unused_parameters_true"``, or ``"sharded"``.

    Args:
        teacher: The teacher. It is in no checkpoint: give it again when one is loaded.
        student: Makes samples: called as ``student(noise, group, cond)``; a ``OneStepStudent`` of a
            copy of the teacher if not given.
        fake: The model that learns the student's samples; a copy of the teacher if not given.
        draws: Times and noise for each sample of the student; ``CARV(1)``, strata over the step, if
            not given. More draws lower the variance; no study has found that samples improve.
        fake_steps: Steps of the fake model for each step of the student.
        normalizer: Whether each draw is divided by its ``mean|x - x0_real|``.
        weighting: Weight in x0 space on the difference; 1 if not given.
        time_range: Quantiles of the teacher's times between which t is drawn.
        optimizer: Makes the optimizer of the student from its parameters.
        fake_optimizer: Makes that of the fake model; ``optimizer`` if not given.
        on_nonfinite: What to do where something is not finite: ``"raise"``, or ``"skip"`` the step.

    Attributes:
        estimate: The latest estimate of the student's gradient, without graph.
        iteration: Number of steps of the student so far.
        sample_shape: Shape of a sample, known from the first batch on.

    Raises:
        ValueError: If the draws would give a biased estimate, or leave K open.
    """

    residual_space = "x0"
    variance_parts = ("sample", *PARTS[1:])

    logged = ("train/fake_loss", "train/gradient_norm", "train/residual_norm")

    def __init__(
        self,
        teacher: FrozenTeacher,
        student: nn.Module | None = None,
        fake: Diffusion | None = None,
        draws: Draws | None = None,
        fake_steps: int = 5,
        normalizer: bool = True,
        weighting: Weighting | None = None,
        time_range: tuple[float, float] = (0.02, 0.98),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        fake_optimizer: OptimizerCallable | None = None,
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_at_least("fake_steps", fake_steps, 1)
        self._description = describe_arguments(self)
        self.teacher = teacher
        self.student = student or OneStepStudent(trainable(teacher))
        self.fake = fake or trainable(teacher)
        self.draws = draws or CARV(1)
        self.fake_steps, self.normalizer = fake_steps, normalizer
        self.optimizer = Uncopied(optimizer)
        self.fake_optimizer = Uncopied(fake_optimizer or optimizer)
        self.on_nonfinite = on_nonfinite
        self.weighting = weighting or UnitWeighting("x0")
        self.time_range = time_range
        self.estimate: DistillationEstimate | None = None
        self.iteration = 0
        self.sample_shape: tuple[int, ...] | None = None
        self.check_slots()

    @torch.no_grad()
    def residual(self, noised: Noised) -> Tensor:
        """Return ``x0_fake - x0_real`` of each draw ``(n, *)``, normalised if asked to."""
        real, (cond, _) = self.teacher.denoise(noised), split_negative(noised.cond)
        with evaluating(self.fake):
            fake = self.fake.denoise(noised.xt, noised.t, noised.group, cond)
        if not self.normalizer:
            return fake - real
        magnitude = (noised.x0 - real).flatten(1).abs().mean(dim=1)
        # an untrained teacher may return the sample itself: 0 / 0
        least = torch.finfo(torch.float32).eps * self.teacher.model.sigma_data
        return (fake - real) / expand(magnitude.clamp(min=least), real)

    def generate(self, like: Clean, source: torch.Generator) -> Clean:
        """Return the student's samples in the shape and under the conditions of others."""
        shape, device = like.x0.shape, like.x0.device
        noise = torch.randn(shape, generator=source, device=device, dtype=torch.float32)
        cond, _ = split_negative(like.cond)
        return Clean(self.student(noise, like.group, cond), like.group, like.cond)

    def clean(self, batch: Any) -> Clean:
        """Return samples of the student, whose noise comes from torch's global generator."""
        seed = int(torch.randint(2**62, ()))
        return self.generate(self._conditions(batch), generator(seed, "z", device=self.device))

    def noisy_loss(self, precision: Precision = nullcontext) -> NoisyDistillation:
        return NoisyDistillation(self, precision)

    def check_slots(self) -> None:
        """Raise if the draws would give a biased estimate, or leave K open."""
        check_distillation(self.draws, self.objective, type(self).__name__)

    def other_work(self, batch: Any) -> None:
        """Do the fake model's steps on a batch up to its optimizer's, to be timed; keep nothing."""
        like = self._conditions(batch)
        parameters = [p for p in self.fake.parameters() if p.requires_grad]
        for step in range(self.fake_steps):
            torch.autograd.grad(self._fake_estimate(like, step).loss, parameters, allow_unused=True)

    def on_fit_start(self) -> None:
        """Raise if ranks would wait for gradients that never come."""
        super().on_fit_start()
        check_alternating_steps(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Step the fake model ``fake_steps`` times, then the student."""
        like = self._conditions(batch)
        self.sample_shape = tuple(like.x0.shape[1:])
        student, fake = cast(list[Any], self.optimizers())
        for step in range(self.fake_steps):
            found = self._fake_estimate(like, step)
            self.fake.draws.observe(detached(found), self.fake.objective)
            self._step(fake, found.loss)
            self.fake.draws.advance()

        source = self.generator("student", self.iteration)
        x = self.generate(like, source)
        given = (self.residual, self.draws, self.objective, source, self._part("strata"))
        estimate = distill(x, *given)
        self.estimate = detached(estimate)
        self.draws.observe(self.estimate, self.objective)
        self._step(student, estimate.loss)
        self.draws.advance()
        self.iteration += 1
        numbers = self.estimate.numbers() | {"fake_loss": found.loss.detach()}
        numbers = {f"train/{name}": value for name, value in numbers.items()}
        self.log_dict(numbers, batch_size=len(like.x0))

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        group: Tensor | list[int] | None = None,
        cond: Condition | None = None,
        shape: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Return samples of the student ``(count, *shape)``.

        Args:
            count: Number of samples.
            group: Class labels ``(count,)``, or None.
            cond: Condition, of one row for all or of ``count``.
            shape: Shape of one sample; that of the batches if not given.
            seed: Seed of the noise; ranks draw different noise.
        """
        size, device = sample_arguments.size(count, shape, self.sample_shape), device_of(self)
        labels = None if group is None else torch.as_tensor(group, device=device)
        like = Clean(torch.empty(size, device=device), labels)
        if cond is not None:
            like = Clean(like.x0, labels, expanded(cond, count, device))
        with evaluating(self), whole_weights(self):
            return self.generate(like, self.generator("sample", seed=seed)).x0

    def configure_optimizers(self) -> list[Optimizer]:
        """Make the optimizers of the student and of the fake model."""
        student = self.optimizer(p for p in self.student.parameters() if p.requires_grad)
        fake = self.fake_optimizer(p for p in self.fake.parameters() if p.requires_grad)
        return [student, fake]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the iteration, what the draws have learned and what rebuilds the module."""
        super().on_save_checkpoint(checkpoint)
        shape = None if self.sample_shape is None else list(self.sample_shape)
        checkpoint[STATE] |= {"iteration": self.iteration, "sample_shape": shape}
        keep_learned(checkpoint)
        self._description.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on at the iteration of the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(STATE, {})
        self.iteration, shape = int(state.get("iteration", 0)), state.get("sample_shape")
        self.sample_shape = tuple(shape) if shape else None

    def _conditions(self, batch: Any) -> Clean:
        clean = Clean.from_batch(batch).expanded()
        group = clean.group if self.teacher.model.num_classes is not None else None
        return Clean(clean.x0, group, clean.cond)

    def _fake_estimate(self, like: Clean, step: int) -> LossEstimate:
        """Return the diffusion loss of the fake model on fresh samples of the student."""
        source = self.generator("fake", self.iteration, step)
        with torch.no_grad():
            x = self.generate(like, source)
        own, fake = Clean(x.x0, x.group, split_negative(x.cond)[0]), self.fake
        part = self._part("fake strata", step)
        times = fake.draws.times(own, fake.objective, source, part)
        return fake.compute_loss(*fake.draw(own, source, times))

    def _part(self, *key: int | str) -> StepPart:
        shared = generator(self.run_seed, *key, self.iteration, device=self.device)
        return StepPart(rank(), world_size(), shared)

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def trainable(teacher: FrozenTeacher) -> Diffusion:
    """Return a copy of a teacher's model to train, which drops no labels or conditions."""
    model = copy.deepcopy(teacher.model).requires_grad_(True).train()
    model.label_dropout = model.cond_dropout = 0.0
    return model
