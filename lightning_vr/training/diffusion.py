"""Diffusion: clean samples, draws, target, network and loss as an nn.Module, for any training loop.

    batch → encode → draws → target → network → loss

Each slot has a plain default: ``IID`` draws, the ``DSM`` target, no control variate. All randomness
comes from the generator that ``loss`` is given; ``generator`` makes one that is keyed by the run's
seed, the rank and whatever tells one draw from others, so that ranks draw different noise and a run
that resumes draws the same.
"""

from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_vr.core.conditions import Condition, expanded
from lightning_vr.core.devices import device_of
from lightning_vr.core.gradients import mean_in_chunks
from lightning_vr.core.rows import Rows, tensors
from lightning_vr.core.sharding import is_sharded, whole_weights
from lightning_vr.core.types import (
    WHOLE_STEP,
    Clean,
    LossEstimate,
    Noised,
    StepPart,
    TargetEstimate,
    Times,
)
from lightning_vr.core.validation import check_choice, check_positive
from lightning_vr.estimators.draws import IID, Draws, drop_conditions
from lightning_vr.estimators.learned_variance import LearnedVariance
from lightning_vr.estimators.loss import ControlVariate, diffusion_loss
from lightning_vr.estimators.slot import drop_control_variate
from lightning_vr.estimators.targets import DSM, Target
from lightning_vr.process.diffusers_schedule import as_schedule
from lightning_vr.process.pixel_levels import check_on_levels
from lightning_vr.process.predictions import PredictionType
from lightning_vr.process.sampling import Sampler, evaluating
from lightning_vr.process.schedules import EDM, Schedule
from lightning_vr.process.timesteps import Density
from lightning_vr.process.weightings import UnitWeighting, Weighting
from lightning_vr.training import sample_arguments
from lightning_vr.training.checks import (
    check_call,
    check_clean,
    check_conditioning,
    check_estimators,
    check_objective,
    check_predicts_variance,
    check_upstream,
)
from lightning_vr.training.denoising import Denoising
from lightning_vr.training.guidance import check_cond_dropout, check_guidance
from lightning_vr.training.network_settings import prepare_network, use_plain_keys
from lightning_vr.training.upstream import NullCondition


class Diffusion(Denoising):
    """A diffusion model with pluggable estimators of its loss.

    Use it as is, or override ``encode`` (the upstream: an autoencoder, a text encoder), ``decode``
    and ``predict`` (how the network is called). It trains in any loop; ``DiffusionModule`` is the
    same as a LightningModule.

    Args:
        network: Any ``nn.Module`` that is called as ``network(x, t)``, or a U-Net or transformer of
            diffusers, in the dtype that it has; ``NetworkCall`` says how each is called.
        schedule: Scales of sample and noise, or a scheduler of diffusers; ``EDM()`` if not given.
        prediction: What the network predicts. ``"edm"`` preconditions it, for every schedule.
        timesteps: Density of t; the schedule's usual one if not given.
        weighting: Loss weight in x0 space; unit weight on what the network predicts if not given.
        draws: Times and noise for each sample; ``IID()`` if not given.
        target: Estimate of E[x0 | x_t] to regress on; ``DSM()`` if not given.
        control_variate: A term of the loss whose gradient has mean zero.
        sigma_data: Standard deviation of the data, for the preconditioning of ``"edm"``.
        num_classes: Number of class labels that the network is conditioned on. Its embedding needs
            one more, the last, for dropped labels. Without it labels are ignored.
        label_dropout: Fraction of labels to drop, for classifier-free guidance.
        cond_dropout: Fraction of further conditions to drop, together with labels where both are.
        null_cond: What stands for a dropped condition: ``"zeros"``, or a row of numbers for each
            name of the condition; what ``encode_null`` returns if not given.
        sampler: How samples are drawn; ``Sampler()`` if not given.
        gradient_checkpointing: Whether to compute activations again for gradients: less memory.
        compile_network: Whether to compile the network by ``torch.compile``.
        variance: Learns the variance of reverse steps too, by a network of twice the channels and
            a diffusers scheduler with a table of timesteps.

    Attributes:
        sample_evaluations: Calls of the network that each sample of the last ``sample`` took.
        sample_shape: Shape of one encoded sample, known from the first batch on.
        sample_calls: Calls of ``sample`` so far without ``source`` and ``seed``.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule | None = None,
        prediction: PredictionType = "edm",
        timesteps: Density | None = None,
        weighting: Weighting | None = None,
        draws: Draws | None = None,
        target: Target | None = None,
        control_variate: ControlVariate | None = None,
        sigma_data: float = 0.5,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        cond_dropout: float = 0.0,
        null_cond: NullCondition = None,
        sampler: Sampler | None = None,
        gradient_checkpointing: bool = False,
        compile_network: bool = False,
        variance: LearnedVariance | None = None,
    ) -> None:
        super().__init__(num_classes, null_cond)
        check_choice("prediction", prediction, get_args(PredictionType))
        check_positive("sigma_data", sigma_data)
        self.sampler = sampler or Sampler()
        check_conditioning(network, num_classes, label_dropout)
        check_cond_dropout(cond_dropout, has_null_cond=self.has_null_cond)
        guidance = self.sampler.guidance
        check_guidance(guidance, num_classes, label_dropout, has_null_cond=self.has_null_cond)
        self.network = prepare_network(network, gradient_checkpointing, compile_network)
        self.schedule = EDM() if schedule is None else as_schedule(schedule)
        self.prediction = prediction
        self.timesteps = timesteps or self.schedule.default_timesteps()
        self.weighting = weighting or UnitWeighting(prediction, sigma_data)
        self.draws = draws or IID()
        self.target = target or DSM()
        self.control_variate = control_variate
        self.variance = variance
        self.sigma_data = sigma_data
        self.label_dropout = label_dropout
        self.cond_dropout = cond_dropout
        self.sampler.noise_levels(self.schedule)  # raises where its bounds do not fit the schedule

        if type(self).predict is Diffusion.predict:
            may_condition = type(self).encode is not Diffusion.encode
            check_call(network, num_classes, may_condition=may_condition)
        check_objective(self.objective)
        check_estimators(self.draws, control_variate, self.objective, network, variance)
        check_predicts_variance(self, variance)
        self.register_load_state_dict_pre_hook(drop_control_variate)  # type: ignore[no-untyped-call]
        use_plain_keys(self)

        self.sample_shape: tuple[int, ...] | None = None
        self.sample_calls = self.sample_evaluations = 0
        self._checked_modes: set[bool] = set()

    def loss(
        self,
        batch: Any,
        source: torch.Generator,
        *,
        draws: Draws | None = None,
        target: Target | None = None,
        part: StepPart = WHOLE_STEP,
    ) -> LossEstimate:
        """Return the loss of a batch: an unbiased estimate, whatever the slots hold.

        The first batch in training and the first in evaluation mode are checked.

        Args:
            batch: What ``encode`` takes.
            source: Generator of all randomness, on the batch's device.
            draws: Used in place of the model's own; validation uses ``IID()``.
            target: Used in place of the model's own; validation uses ``DSM()``.
            part: The part of an optimizer step that the batch is.
        """
        clean = self.clean(batch)
        if self.training not in self._checked_modes:
            check_clean(clean, self.num_classes, allow_nonfinite=self.skips_nonfinite)
            check_upstream(clean, self.target)
            check_on_levels(clean.x0, None if self.variance is None else self.variance.levels)
            self.sample_shape = tuple(clean.x0.shape[1:])
            self._checked_modes.add(self.training)
        draws = draws or self.draws
        times = draws.times(clean, self.objective, source, part)
        found = self.draw(clean, source, times, draws=draws, target=target)
        return self.compute_loss(*found, draws=draws)

    def draw(
        self,
        clean: Clean,
        source: torch.Generator,
        times: Times,
        *,
        draws: Draws | None = None,
        target: Target | None = None,
    ) -> tuple[Noised, TargetEstimate]:
        """Noise clean samples at given times and estimate what to regress on.

        Args:
            clean: B clean samples.
            source: Generator of all randomness, on their device.
            times: Times from ``draws.times``.
            draws: Used in place of the model's own.
            target: Used in place of the model's own.
        """
        noised = self.noised(clean, source, times, draws)
        found = (target or self.target)(noised, clean, source)
        if self.control_variate is not None:
            noised = self.control_variate.draw(noised, source)
        return noised, found

    def noised(
        self, clean: Clean, source: torch.Generator, times: Times, draws: Draws | None = None
    ) -> Noised:
        """Noise clean samples; in training drop some of their conditions. Arguments as ``draw``."""
        noised = (draws or self.draws).noise(clean, self.schedule, times, source)
        if not self.training:
            return noised
        null = self.null_condition(noised.cond) if self.cond_dropout > 0 else None
        fractions = self.label_dropout, self.cond_dropout
        return drop_conditions(noised, *fractions, null, source)

    def compute_loss(
        self, noised: Noised, target: TargetEstimate, *, draws: Draws | None = None
    ) -> LossEstimate:
        """Return the loss of the network, in chunks if the draws ask for them."""
        draws, count, device = draws or self.draws, len(noised.t), noised.t.device
        chunk = draws.chunk(count, device)
        # ranks that share weights pass through them alike, however few draws one of them has
        if chunk >= count and not (draws.has_chunks(device) and is_sharded(self)):
            return self._estimate(noised, target)
        rows = {"noised": tensors(noised), "target": tensors(target)}
        loss, terms = mean_in_chunks(self, self.loss_terms, rows, chunk, scale=self.loss_scale())
        per_draw, control, *bound = terms.unbind(dim=1)
        return LossEstimate(loss, per_draw, noised, target, control, *bound)

    def per_draw_losses(self, rows: Rows) -> Tensor:
        """Return the loss of each row of ``"noised"`` and ``"target"``, ``(n,)``."""
        return self.loss_terms(rows).sum(dim=1)

    def loss_terms(self, rows: Rows) -> Tensor:
        """Return the terms of each row's loss ``(n, k)``: squared error, control, bound if any."""
        noised, target = Noised(**rows["noised"]), TargetEstimate(**rows["target"])
        found = self._estimate(noised, target)
        control = torch.zeros_like(found.per_draw) if found.control is None else found.control
        bound = [] if found.bound is None else [found.bound]
        return torch.stack([found.per_draw, control, *bound], dim=1)

    def loss_scale(self) -> float:
        """Return the factor on the loss while it is differentiated; float16 needs one above 1."""
        return 1.0

    @property
    def skips_nonfinite(self) -> bool:
        """Whether samples that are not finite are dealt with after the loss, and not refused."""
        return False

    def sample(
        self,
        count: int,
        *,
        group: Tensor | list[int] | None = None,
        cond: Condition | None = None,
        shape: tuple[int, ...] | None = None,
        sampler: Sampler | None = None,
        source: torch.Generator | None = None,
        seed: int | None = None,
        batch_size: int = 256,
        progress: bool = False,
    ) -> Tensor:
        """Return samples in x0 space ``(count, *shape)``; ``decode`` turns them into pictures.

        Args:
            count: Number of samples.
            group: Class labels ``(count,)``, or None for samples without a class.
            cond: Further condition, one row per sample in each tensor, or one for all.
            shape: Shape of one sample; that of the training data if not given.
            sampler: Used in place of the model's own.
            source: Generator of the noise, on the model's device; each call's own if not given.
            seed: Seed of the noise in place of ``source``; ranks draw different noise.
            batch_size: Number of samples at a time.
            progress: Whether to show a progress bar if it takes longer than a second.
        """
        sampler, device = sampler or self.sampler, device_of(self)
        size = sample_arguments.size(count, shape, self.sample_shape)
        dropout, guidance = self.label_dropout, sampler.guidance
        group = sample_arguments.labels(group, count, self.num_classes, dropout, device)
        cond = self.encode_null() if cond is None else cond
        cond = None if cond is None else expanded(cond, count, device)
        check_guidance(guidance, self.num_classes, dropout, has_null_cond=self.has_null_cond)
        null = self.stated_null() if guidance != 1 and cond is not None else None
        stream = sample_arguments.source(self, source, seed, self.sample_calls)
        self.sample_calls += source is None and seed is None
        noise = torch.randn(size, generator=stream, device=device, dtype=torch.float32)
        with torch.no_grad(), evaluating(self), whole_weights(self):
            x0, self.sample_evaluations = sampler.draw(
                self.denoise,
                self.schedule,
                noise,
                group=group,
                cond=cond,
                null_cond=null,
                reverse=self.reverse_estimate,
                generator=stream,
                batch_size=batch_size,
                progress=progress,
            )
        return x0

    def _estimate(self, noised: Noised, target: TargetEstimate) -> LossEstimate:
        if self.variance is not None:
            return self.variance.loss(self.predict_with_variance, noised, target, self.objective)
        return diffusion_loss(self.predict, noised, target, self.objective, self.control_variate)
