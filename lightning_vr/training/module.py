"""DiffusionModule: a ``Diffusion`` as a LightningModule whose runs resume exactly.

Steps, optimizers, and what a run prepares: pilots that choose settings while it trains, and the
references of its target. Validation and tests use the plain denoising loss with noise that is the
same in every epoch.
"""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_vr.core.distributed import rank, world_size
from lightning_vr.core.rng import generator, seed_global_rng
from lightning_vr.core.rows import detached
from lightning_vr.core.types import LossEstimate, StepPart
from lightning_vr.estimators.draws import IID, Draws
from lightning_vr.estimators.learned_variance import LearnedVariance
from lightning_vr.estimators.loss import ControlVariate
from lightning_vr.estimators.slot import SLOTS
from lightning_vr.estimators.targets import DSM, Target
from lightning_vr.lifecycle.finite_guard import OnNonFinite
from lightning_vr.lifecycle.hyperparameters import describe_arguments
from lightning_vr.lifecycle.own_state import STATE
from lightning_vr.lifecycle.precision import loss_scale
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.lifecycle.uncopied import Uncopied
from lightning_vr.lifecycle.weight_averaging import keep_learned
from lightning_vr.process.predictions import PredictionType
from lightning_vr.process.reverse_estimate import ReverseEstimate
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.timesteps import Density
from lightning_vr.process.weightings import Weighting
from lightning_vr.training.adapters import Adapter, LoRA
from lightning_vr.training.checks import check_estimators
from lightning_vr.training.control_pilot import ControlPilot, control_pilot
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.hand_over import HandOver
from lightning_vr.training.monitors import MonitoredSchedules
from lightning_vr.training.noisy_losses import DiffusionLoss, Precision
from lightning_vr.training.reference_bank import fill_target, prefetch_references, refill_target
from lightning_vr.training.resamples_pilot import ResamplesPilot
from lightning_vr.training.sigma_data import AutoSigmaData, SigmaData
from lightning_vr.training.training_checks import check_ranks, check_sharded
from lightning_vr.training.upstream import NullCondition


class DiffusionModule(HandOver, AutoSigmaData, MonitoredSchedules, EstimatorModule):
    """Trains a diffusion model with pluggable estimators of its loss.

    Use it as is, or override ``encode`` (the upstream: a text encoder, a renderer), ``decode`` and
    ``predict`` (how the network is called). Arguments not listed are those of ``Diffusion``.

    Args:
        sigma_data: Standard deviation of the data, for the preconditioning of ``"edm"``, or
            ``"auto"``: that of the data module's training data, which checkpoints keep.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate schedule, over optimizer steps, from the optimizer.
        on_nonfinite: What to do where something is not finite. ``"raise"``: stop, and say which
            sample at which noise level. ``"skip"``: make no step; ``train/skipped_steps`` counts.
        adapter: Trains an adapter of low rank in place of the network's own weights.

    Attributes:
        estimate: The loss of the latest training batch and its parts, without gradient.
    """

    estimator_slots = SLOTS

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
        sigma_data: SigmaData = 0.5,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        cond_dropout: float = 0.0,
        null_cond: NullCondition = None,
        sampler: Sampler | None = None,
        gradient_checkpointing: bool = False,
        compile_network: bool = False,
        variance: LearnedVariance | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        on_nonfinite: OnNonFinite = "raise",
        adapter: LoRA | None = None,
    ) -> None:
        super().__init__(
            network,
            schedule,
            prediction,
            timesteps,
            weighting,
            draws,
            target,
            control_variate,
            self.first_sigma_data(sigma_data),
            num_classes,
            label_dropout,
            cond_dropout,
            null_cond,
            sampler,
            gradient_checkpointing,
            compile_network,
            variance,
        )
        self._description = describe_arguments(self)
        # afterwards, as a checkpoint describes the network without it
        self._adapter = None if adapter is None else Adapter(self.network, adapter)
        self.note_sigma_data(sigma_data, has_weighting=weighting is not None)
        self.optimizer = Uncopied(optimizer)
        self.lr_scheduler = None if lr_scheduler is None else Uncopied(lr_scheduler)
        self.on_nonfinite = on_nonfinite
        self.estimate: LossEstimate | None = None
        self._pilots: list[ResamplesPilot | ControlPilot] = []

    def loss_scale(self) -> float:
        return 1.0 if self._trainer is None else loss_scale(self._trainer)

    @property
    def skips_nonfinite(self) -> bool:
        return self.on_nonfinite == "skip"

    def prepare_training(self) -> None:
        """Make the pilots, and fill the target's bank with the encoded training set."""
        check_ranks(self.draws)
        check_sharded(self)
        run = RunContext.of(self.trainer)
        found = self.make_resamples_pilot(run), control_pilot(self, run)
        self._pilots = [pilot for pilot in found if pilot is not None]
        if self.target.bank_size != 0:
            fill_target(self, self.trainer)

    def noisy_loss(self, precision: Precision = nullcontext) -> DiffusionLoss:
        return DiffusionLoss(self, precision)

    def check_slots(self) -> None:
        slots = self.draws, self.control_variate
        check_estimators(*slots, self.objective, self.network, self.variance)

    def on_train_epoch_start(self) -> None:
        """Fill the target's bank again if the training set is drawn anew."""
        super().on_train_epoch_start()
        refill_target(self, self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one micro-step and keep its estimate for callbacks."""
        micro_steps = self.trainer.accumulate_grad_batches
        micro_step = batch_idx % micro_steps
        if micro_step == 0:
            for pilot in self._pilots:
                pilot.before_step(batch)
        strata = generator(self.run_seed, "strata", self.global_step, device=self.device)
        part = StepPart(rank() * micro_steps + micro_step, world_size() * micro_steps, strata)
        source = self.generator("train", self.global_step, micro_step)

        estimate = self.loss(batch, source, part=part)
        prefetch_references(self, self.trainer, micro_step, estimate.noised)
        self.estimate = detached(estimate)  # a trained upstream has made all of its parts
        with torch.no_grad():
            self.draws.observe(self.estimate, self.objective)
        self._guard.add_draws(self.estimate, micro_step)
        self._log_loss("train", self.estimate)
        return estimate.loss

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

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Draw one sample for each ``"index"``, for its ``"label"`` and columns of conditions."""
        source = self.generator("predict", batch_idx)
        columns = {name: x for name, x in batch.items() if name not in ("index", "label")}
        cond = self.encode_condition(columns) if columns else None
        asked: dict[str, Any] = {"group": batch.get("label"), "cond": cond}
        x0 = self.sample(len(batch["index"]), **asked, source=source, progress=True)
        return self.decode(x0)

    def reverse_estimate(self, *args: Any, **kwargs: Any) -> ReverseEstimate:
        """Do what ``Diffusion`` does; ``trainer.predict`` stops here if it was asked to."""
        self.stop_evaluation_if_asked()
        return super().reverse_estimate(*args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what rebuilds the module, and what its slots have learned."""
        super().on_save_checkpoint(checkpoint)
        shape = None if self.sample_shape is None else list(self.sample_shape)
        checkpoint[STATE] |= {"sample_shape": shape, "sample_calls": self.sample_calls}
        keep_learned(checkpoint)
        self._description.save(self, checkpoint)
        if self._adapter is not None:
            self._adapter.keep_alone(self.network, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the samples' shape and number and, to resume a fit, the rest."""
        self.complete_checkpoint(checkpoint)
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(STATE, {})
        shape = state.get("sample_shape")
        self.sample_shape = tuple(shape) if shape else None
        self.sample_calls = state.get("sample_calls", 0)

    def complete_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the weights that an adapter was trained on back into its checkpoint."""
        if self._adapter is not None:
            self._adapter.complete(self.network, checkpoint)

    def _evaluation_step(self, stage: str, batch: Any, batch_idx: int) -> None:
        source = self.generator("evaluate", batch_idx)  # by the seed that is in force outside
        # a random `encode` draws from another key than the noise
        with seed_global_rng(self.generator("evaluate", "global", batch_idx)):
            estimate = self.loss(batch, source, draws=IID(), target=DSM())
        self._log_loss(stage, estimate, sync_dist=True)

    def _log_loss(self, stage: str, estimate: LossEstimate, *, sync_dist: bool = False) -> None:
        # each number on a progress bar makes the step wait for the device
        has_bar = self.trainer.progress_bar_callback is not None
        count = len(estimate.per_draw)
        self.log(
            f"{stage}/loss", estimate.loss, prog_bar=has_bar, sync_dist=sync_dist, batch_size=count
        )
