"""DiffusionModule: clean samples, draws, target, network and loss as a LightningModule.

    batch → encode → draws → target → network → loss

Each slot has a plain default: ``IID`` draws, the ``DSM`` target, no control variate. Randomness
comes from generators keyed by (seed, purpose, rank, step), so that ranks differ, a resumed run
repeats what the uninterrupted one draws, and nothing that measures disturbs training. For dropout
and a random ``encode`` torch's global generator is seeded by such a key while a batch is passed.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from typing_extensions import Self

from lightning_vr.core.distributed import broadcast, rank, world_size
from lightning_vr.core.gradients import mean_in_chunks
from lightning_vr.core.rng import generator, seed_global_rng
from lightning_vr.core.rows import Rows, detached, tensors
from lightning_vr.core.types import (
    UNLABELLED,
    WHOLE_STEP,
    Clean,
    LossEstimate,
    Noised,
    StepPart,
    TargetEstimate,
    Times,
)
from lightning_vr.estimators.draws import IID, Draws
from lightning_vr.estimators.loss import ControlVariate, denoise, diffusion_loss
from lightning_vr.estimators.slot import drop_control_variate, keep_learned
from lightning_vr.estimators.targets import DSM, Target
from lightning_vr.lifecycle.checkpoint_io import use_durable_checkpoints
from lightning_vr.lifecycle.checkpoints import STATE
from lightning_vr.lifecycle.csv_logs import keep_csv_logs_whole
from lightning_vr.lifecycle.epoch_length import equalize_epoch_length
from lightning_vr.lifecycle.finite_guard import FiniteGuard, OnNonFinite
from lightning_vr.lifecycle.hyperparameters import describe_arguments, load_module
from lightning_vr.lifecycle.loggers import warn_on_logger_errors
from lightning_vr.lifecycle.precision import loss_scale, loss_scaler, unscales_itself
from lightning_vr.lifecycle.resuming import Resuming
from lightning_vr.lifecycle.stopping import SharedStop, bypass_collectives
from lightning_vr.process.networks import call_network
from lightning_vr.process.objective import Objective
from lightning_vr.process.predictions import PredictionType, check_prediction
from lightning_vr.process.sampling import Sampler, evaluating
from lightning_vr.process.schedules import EDM, Schedule
from lightning_vr.process.timesteps import Density
from lightning_vr.process.weightings import UnitWeighting, Weighting, check_positive
from lightning_vr.training.checks import (
    check_call,
    check_clean,
    check_control_variate,
    check_draws,
    check_group,
    check_guidance,
    check_labels,
    check_network,
    check_times,
    check_upstream,
)
from lightning_vr.training.control_pilot import ControlPilot, control_pilot
from lightning_vr.training.reference_bank import fill_target
from lightning_vr.training.resamples_pilot import ResamplesPilot, resamples_pilot
from lightning_vr.training.training_checks import check_optimization, check_ranks, check_trainer


class DiffusionModule(LightningModule):
    """Trains a diffusion model with pluggable estimators of its loss.

    Use it as is, or override ``encode`` (the upstream: an autoencoder, a text encoder), ``decode``
    and ``predict`` (how the network is called).

    Args:
        network: Called as ``network(x, t)``, with ``class_labels=`` if ``num_classes`` is given
            and a sample's condition as keywords; returns a tensor, a tuple that starts with one,
            or an object with ``sample``. Any ``nn.Module``, diffusers' models among them.
        schedule: Scales of sample and noise; ``EDM()`` if not given.
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
        sampler: How samples are drawn; ``Sampler()`` if not given.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimizer; steps are optimizer
            steps.
        on_nonfinite: What to do where a sample, a loss or a gradient is not finite. ``"raise"``:
            stop, and say which sample at which noise level. ``"skip"``: make no step, on all ranks;
            ``train/skipped_steps`` counts them.
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
        sampler: Sampler | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        super().__init__()
        check_prediction(prediction)
        check_positive("sigma_data", sigma_data)
        check_labels(num_classes, label_dropout)
        check_network(network, num_classes)
        self._description = describe_arguments(self)
        self.network = network
        self.schedule = schedule or EDM()
        self.prediction = prediction
        self.timesteps = timesteps or self.schedule.default_timesteps()
        self.weighting = weighting or UnitWeighting(prediction, sigma_data)
        self.draws = draws or IID()
        self.target = target or DSM()
        self.control_variate = control_variate
        self.sigma_data = sigma_data
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.sampler = sampler or Sampler()
        self.sampler.noise_levels(self.schedule)  # refuses bounds that do not fit the schedule
        self.optimizer = _Shared(optimizer)
        self.lr_scheduler = None if lr_scheduler is None else _Shared(lr_scheduler)
        self.on_nonfinite = on_nonfinite
        self._guard = FiniteGuard(on_nonfinite)

        if type(self).predict is DiffusionModule.predict:
            may_condition = type(self).encode is not DiffusionModule.encode
            check_call(network, num_classes, may_condition=may_condition)
        check_guidance(self.sampler.guidance, num_classes)
        check_times(self.objective)
        check_draws(self.draws, self.objective, network)
        check_control_variate(control_variate, network)
        self.register_load_state_dict_pre_hook(drop_control_variate)  # type: ignore[no-untyped-call]

        self._pilots: list[ResamplesPilot | ControlPilot] = []
        self._resuming = Resuming()
        self._stop = SharedStop()
        self.estimate: LossEstimate | None = None
        self.sample_shape: tuple[int, ...] | None = None
        self.seed: int | None = None
        self._checked_modes: set[bool] = set()

    def encode(self, batch: Any) -> Clean:
        """Turn a batch into clean samples; override it for latents or conditions.

        Args:
            batch: What ``Clean.from_batch`` takes, unless overridden.
        """
        return Clean.from_batch(batch)

    def clean(self, batch: Any) -> Clean:
        """Encode a batch, without the labels that the network does not see.

        Samples are exchangeable given what the network is conditioned on: for an unconditional one
        labels are no reason to mask references.
        """
        clean = self.encode(batch)
        return clean if self.num_classes is not None else replace(clean, group=None)

    def decode(self, x0: Tensor) -> Tensor:
        """Turn samples into what a person looks at; the identity unless overridden."""
        return x0

    def predict(self, x: Tensor, noised: Noised) -> Tensor:
        """Call the network on scaled samples ``x (B, *)``; override it for other signatures."""
        arguments: dict[str, Any] = dict(noised.cond or {})
        if self.num_classes is not None:
            labels = noised.group
            if labels is None:
                labels = torch.full_like(noised.t, UNLABELLED, dtype=torch.int64)
            arguments["class_labels"] = torch.where(labels < 0, self.num_classes, labels)
        time = self.schedule.embedding_time(noised.t)
        return call_network(self.network, x.to(self.dtype), time, arguments)

    def denoise(
        self,
        xt: Tensor,
        t: Tensor,
        group: Tensor | None = None,
        cond: dict[str, Any] | None = None,
    ) -> Tensor:
        """Return x0_hat ``(B, *)`` for ``xt (B, *)`` at times ``t (B,)``.

        Args:
            xt: Noised samples.
            t: Times.
            group: Class labels ``(B,)``, negative where unconditional, or None for all of these.
            cond: Further condition of the network.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        weight = torch.ones_like(t)
        noised = Noised(xt, xt, torch.zeros_like(xt), t, alpha, sigma, weight, group, cond)
        return denoise(self.predict, noised, self.objective)

    def loss(
        self,
        batch: Any,
        source: torch.Generator,
        *,
        draws: Draws | None = None,
        target: Target | None = None,
        part: StepPart = WHOLE_STEP,
    ) -> LossEstimate:
        """Return the loss of a batch, an unbiased estimate whatever the slots hold.

        The first batch is checked, and so is the first training batch.

        Args:
            batch: What ``encode`` takes.
            source: Generator of all randomness, on the batch's device.
            draws: Used in place of the module's own; validation draws as ``IID()`` does.
            target: Used in place of the module's own; validation regresses on ``DSM()``.
            part: The part of an optimizer step that the batch is.
        """
        clean = self.clean(batch)
        if self.training not in self._checked_modes:
            check_clean(clean, self.num_classes, allow_nonfinite=self.on_nonfinite == "skip")
            check_upstream(clean, self.target)
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
            times: What ``draws.times`` has drawn for them.
            draws: Used in place of the module's own.
            target: Used in place of the module's own.
        """
        noised = (draws or self.draws).noise(clean, self.schedule, times, source)
        if self.training and self.label_dropout > 0 and noised.group is not None:
            noised = replace(noised, group=self._drop_labels(noised.group, source))
        found = (target or self.target)(noised, clean, source)
        if self.control_variate is not None:
            noised = self.control_variate.draw(noised, source)
        return noised, found

    def compute_loss(
        self, noised: Noised, target: TargetEstimate, *, draws: Draws | None = None
    ) -> LossEstimate:
        """Return the loss of the network, in the chunks that ``draws``, or its own, ask for."""
        chunk = (draws or self.draws).chunk(len(noised.t), noised.t.device)
        if chunk >= len(noised.t):
            return self._estimate(noised, target)
        rows = {"noised": tensors(noised), "target": tensors(target)}
        scale = 1.0 if self._trainer is None else loss_scale(self._trainer)
        loss, summands = mean_in_chunks(self, self._loss_terms, rows, chunk, scale=scale)
        per_draw, control = summands.unbind(dim=1)
        return LossEstimate(loss, per_draw, noised, target, control)

    def per_draw_losses(self, rows: Rows) -> Tensor:
        """Return the loss of each row of ``"noised"`` and ``"target"``, ``(n,)``."""
        return self._loss_terms(rows).sum(dim=1)

    @property
    def objective(self) -> Objective:
        """The loss as an expectation, whatever estimates it."""
        return Objective(
            self.schedule, self.timesteps, self.weighting, self.prediction, self.sigma_data
        )

    def generator(self, *key: int | str) -> torch.Generator:
        """Return the generator of this run, this rank and ``key``, on the module's device."""
        return generator(self.run_seed, rank(), *key, device=self.device)

    @property
    def run_seed(self) -> int:
        """The seed of the run: fixed when training starts, kept in the checkpoint."""
        return torch.initial_seed() % 2**63 if self.seed is None else self.seed

    def sample(
        self,
        count: int,
        *,
        group: Tensor | None = None,
        cond: dict[str, Any] | None = None,
        shape: tuple[int, ...] | None = None,
        sampler: Sampler | None = None,
        source: torch.Generator | None = None,
        batch_size: int = 256,
        progress: bool = False,
    ) -> Tensor:
        """Draw samples in x0 space; ``decode`` turns them into pictures.

        Args:
            count: How many.
            group: Class labels ``(count,)``, or None for samples without a class.
            cond: Further condition, one row per sample in each tensor.
            shape: Shape of one sample; after training, that of the training data.
            sampler: How; the module's own sampler if not given.
            source: Generator of the noise, on the module's device.
            batch_size: How many at a time.
            progress: Whether to show a progress bar where it takes long.

        Returns:
            ``(count, *shape)``, on the module's device.
        """
        shape = shape or self.sample_shape
        if shape is None:
            raise ValueError(
                "Argument `shape` is needed until the module has seen training data: "
                "pass the shape of one sample, for example (1, 8, 8)."
            )
        if group is not None:
            check_group(group, self.num_classes)
        source = source or self.generator("sample")
        size, dtype = (count, *shape), torch.float32
        noise = torch.randn(size, generator=source, device=self.device, dtype=dtype)
        with torch.no_grad(), evaluating(self):
            return (sampler or self.sampler).draw(
                self.denoise,
                self.schedule,
                noise,
                group=None if group is None else group.to(self.device),
                cond=cond,
                batch_size=batch_size,
                progress=progress,
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one micro-step and keep its estimate for callbacks."""
        parts = self.trainer.accumulate_grad_batches
        micro_step = batch_idx % parts
        if micro_step == 0:
            for pilot in self._pilots:
                pilot.before_step(batch)
        part = StepPart(
            rank() * parts + micro_step,
            world_size() * parts,
            generator(self.run_seed, "strata", self.global_step, device=self.device),
        )
        source = self.generator("train", self.global_step, micro_step)
        with seed_global_rng(self.generator("global", self.global_step, micro_step)):
            estimate = self.loss(batch, source, part=part)
        control = None if estimate.control is None else estimate.control.detach()
        # an upstream in training has made all of it
        self.estimate = LossEstimate(
            estimate.loss.detach(),
            estimate.per_draw.detach(),
            detached(estimate.noised),
            detached(estimate.target),
            control=control,
        )
        with torch.no_grad():
            self.draws.observe(self.estimate, self.objective)
        self._guard.add(self.estimate, micro_step)
        self.log(
            "train/loss",
            estimate.loss.detach(),
            prog_bar=self._has_bar,
            batch_size=len(estimate.per_draw),
        )
        return estimate.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Look for numbers that are not finite: stop, or leave the step out."""
        if not self._guard.check(self):
            self._leave_out_step(optimizer)
            self.log("train/skipped_steps", float(self._guard.skipped))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the draws learn from what all ranks have seen."""
        super().optimizer_step(*args, **kwargs)
        self.draws.advance()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the plain denoising loss with noise that is the same in every epoch."""
        self._evaluation_step("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the plain denoising loss with fixed noise."""
        self._evaluation_step("test", batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Draw one sample for each request: a dictionary with ``"index"`` and maybe ``"label"``."""
        source = self.generator("predict", batch_idx)
        labels = batch.get("label") if self.num_classes is not None else None
        x0 = self.sample(len(batch["index"]), group=labels, source=source, progress=True)
        return self.decode(x0)

    def configure_optimizers(self) -> Any:
        """Make the optimizer and, if there is one, a learning-rate schedule over steps."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        schedule = None if self.lr_scheduler is None else self.lr_scheduler(optimizer)
        check_optimization(optimizer, schedule)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Let neither a full disk nor a logger end the run, and ranks stop together."""
        check_trainer(self)
        self._resuming.begin(self.trainer)
        self._stop.install_signal_handlers(self.trainer)
        use_durable_checkpoints(self.trainer)
        keep_csv_logs_whole(self.trainer)
        warn_on_logger_errors(self.trainer)

    def on_train_start(self) -> None:
        """Fix the seed of the run, fill the target's bank, prepare the draws."""
        if self.seed is None:
            self.seed = int(broadcast(torch.tensor(self.run_seed, device=self.device)))
        equalize_epoch_length(self.trainer)
        self._resuming.restore_gradients(self)
        check_ranks(self.draws, self.device)
        found = resamples_pilot(self), control_pilot(self)
        self._pilots = [pilot for pilot in found if pilot is not None]
        if self.target.bank_size != 0:
            fill_target(self)
        self._resuming.replay_skipped_hooks(self.trainer)

    def on_fit_end(self) -> None:
        """Log what the last step was about to, if that is all that was left to do."""
        if self._resuming.is_due:
            self._resuming.end(self.trainer)

    def on_train_epoch_start(self) -> None:
        """Look at the lengths of loaders that were made anew."""
        if self.trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            equalize_epoch_length(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let loggers count as the optimizer does, which an error in mid-batch may have undone."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step
        self._resuming.has_validated = self._resuming.has_backward_begun = False

    def on_before_backward(self, loss: Tensor) -> None:
        """Note that gradients are about to change."""
        self._resuming.has_backward_begun = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop here if any rank was asked to."""
        self._stop.synchronize(self.trainer)

    def stop_if_asked(self) -> None:
        """End what takes long at once if any rank was asked to; all ranks call it.

        Raises:
            SIGTERMException: If one was.
        """
        self._stop.synchronize(self.trainer)
        if self.trainer.received_sigterm:
            raise SIGTERMException

    def on_validation_epoch_end(self) -> None:
        """Note that the validation run has ended, and stop if any rank was asked to."""
        self._resuming.has_validated = not self.trainer.sanity_checking
        self._stop.synchronize(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed and gradients that wait, so that a resumed run repeats."""
        shape = None if self.sample_shape is None else list(self.sample_shape)
        checkpoint[STATE] = {"seed": self.seed, "sample_shape": shape}
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            bypass_collectives(self._trainer)
            checkpoint[STATE] |= self._resuming.state(self, checkpoint)
            checkpoint[STATE]["skipped"] = self._guard.skipped
        keep_learned(checkpoint)
        self._description.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the samples' shape and, to resume a fit, the rest."""
        state = checkpoint.get(STATE, {})
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.seed = state.get("seed")
            self._resuming.load(state)
            self._guard.skipped = state.get("skipped", 0)
        self.sample_shape = tuple(state["sample_shape"]) if state.get("sample_shape") else None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Rebuild a trained module, of whichever subclass wrote the checkpoint.

        Args:
            checkpoint_path: The checkpoint file.
            map_location: Where to load the weights; their own device if not given.
            strict: Whether the names of all weights must match.
            **kwargs: Constructor arguments in place of the checkpoint's.

        Raises:
            ValueError: If the subclass is not imported, if an argument was an object that no
                configuration can rebuild and is not given again, or if the weights do not fit.
        """
        return load_module(cls, checkpoint_path, map_location, strict, kwargs)

    @property
    def _has_bar(self) -> bool:
        """Whether a bar shows numbers: each of them makes the step wait for the device."""
        return self.trainer.progress_bar_callback is not None

    def _leave_out_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer pass over all parameters."""
        # what scales losses for a fused optimizer looks for infinities only when it steps
        scaled = loss_scaler(self.trainer) is not None and unscales_itself(optimizer)
        for parameter in self.parameters():
            if not scaled:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.fill_(math.inf)

    def _estimate(self, noised: Noised, target: TargetEstimate) -> LossEstimate:
        return diffusion_loss(
            self.predict,
            noised,
            target,
            objective=self.objective,
            control_variate=self.control_variate,
        )

    def _loss_terms(self, rows: Rows) -> Tensor:
        """Return the squared error of each row and the term of the control variate, ``(n, 2)``."""
        noised, target = Noised(**rows["noised"]), TargetEstimate(**rows["target"])
        found = self._estimate(noised, target)
        control = torch.zeros_like(found.per_draw) if found.control is None else found.control
        return torch.stack([found.per_draw, control], dim=1)

    def _drop_labels(self, group: Tensor, source: torch.Generator) -> Tensor:
        count, dtype = len(group), torch.float32
        u = torch.rand(count, generator=source, device=group.device, dtype=dtype)
        return torch.where(u < self.label_dropout, UNLABELLED, group)

    def _evaluation_step(self, stage: str, batch: Any, batch_idx: int) -> None:
        source = self.generator("evaluate", batch_idx)
        with seed_global_rng(source):
            estimate = self.loss(batch, source, draws=IID(), target=DSM())
        self.log(
            f"{stage}/loss",
            estimate.loss,
            prog_bar=self._has_bar,
            sync_dist=True,
            batch_size=len(estimate.per_draw),
        )


class _Shared:
    """A function that copies of a module share, as ``WeightAveraging`` makes one.

    The command line's functions hold on to the whole trainer, which under DDP cannot be copied.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, argument: Any) -> Any:
        return self.function(argument)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self
