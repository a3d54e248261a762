"""Any diffusers scheduler as the solver of a sampler.

One loop serves all of them: the state x begins as noise of the scheduler's own size, its
``scale_model_input`` turns x into what the network sees, and its ``step`` takes the network's
output. What ``step`` wants is x0_hat in another form, since at a given x_t each prediction is an
affine map of x0_hat (``predictions.py``):

============================  =======================  ==================  =====================
scheduler                     state                    the network sees    ``step`` takes
============================  =======================  ==================  =====================
DDPM, DDIM, DPM++, UniPC, …   x_t of the table         the state           its ``prediction_type``
Euler, Heun, LMS, KDPM2, …    x_t / alpha              x_t of the table    its ``prediction_type``
flow matching                 (1 - s) x0 + s noise     the state           noise - x0
EDM                           x0 + s noise             x_t, unscaled here  F of the preconditioning
============================  =======================  ==================  =====================

The schedule of the module must be the scheduler's process: a ``DiffusersSchedule`` of the same
table, ``RectifiedFlow`` or the schedule of a flow scheduler, ``EDM`` or ``VE``. What a scheduler
changes for sampling alone (spacing, Karras sigmas, order) is free, and so is its
``prediction_type``: the network may have learned another one. Then x_t and t are those that
diffusers gives the network, and samples are those of its own pipelines.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.grids import check_within
from lightning_vr.process.predictions import PredictionType, prediction
from lightning_vr.process.schedules import EDM, VE, RectifiedFlow, Schedule, is_diffusers_scheduler
from lightning_vr.process.solvers.solver import Problem, Solver

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class DiffusersSolver(Solver):
    """The steps of a diffusers scheduler.

    Some schedulers clip x0_hat to [-1, 1] unless ``clip_sample=False``, ``DDPMScheduler`` and
    ``DDIMScheduler`` among them: turn that off for data that are not pictures. ``LCMScheduler`` and
    ``TCDScheduler`` are for networks that were distilled for them: others lose contrast.

    Attributes:
        scheduler: The scheduler, for example ``DPMSolverMultistepScheduler()``.

    Raises:
        ValueError: If it is none, or does not sample by steps from noise to data.
    """

    scheduler: "SchedulerMixin"
    unused: ClassVar[tuple[str, ...]] = ("grid", "rho", "noise_level_min", "noise_level_max")

    def __post_init__(self) -> None:
        if not is_diffusers_scheduler(type(self.scheduler)):
            raise ValueError(
                f"`scheduler` must be a diffusers scheduler, got {type(self.scheduler).__name__}: "
                f"use one, as DPMSolverMultistepScheduler()."
            )
        if not self._is_edm:
            DiffusersSchedule(self.scheduler)  # raises for what is neither table nor flow
        self._rehearse()

    def evaluations(self, steps: int) -> int:
        return len(self._started(steps).timesteps)

    def own_noise_levels(self, schedule: Schedule, steps: int) -> Tensor:
        """Return the noise levels at which the network is called, infinite for noise alone.

        Raises:
            ValueError: If the schedule is not the scheduler's process, or the scheduler does not
                take as many steps.
        """
        time_scale = self._time_scale(schedule)
        try:
            t = self._started(steps).timesteps.double()
        except Exception as error:  # whatever a scheduler raises
            raise self._refusal(f"take {steps} steps", error) from error
        if not self._is_edm:
            return schedule.noise_level(time_scale * t)
        levels = torch.exp(4 * t)
        named = f"The noise levels of {type(self.scheduler).__name__}"
        check_within(named, float(levels.min()), float(levels.max()), schedule)
        return levels

    def solve(self, problem: Problem, noise: Tensor) -> Tensor:
        scheduler = self._started(problem.steps, noise.device)
        network = _Network(problem, self._kind, self._time_scale(problem.schedule), self._config)
        options = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = list(problem.noise.generators(noise.device))

        # schedulers are written for the dtype of the network
        x = noise.to(problem.dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for t in scheduler.timesteps:
            seen = _scaled(scheduler, x, t)
            output = network(x if self._is_edm else seen, t.double().cpu())
            x = scheduler.step(output, t, x, **options).prev_sample
        return x.to(noise.dtype)

    @property
    def _config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.scheduler.config
        return config

    @property
    def _is_edm(self) -> bool:
        return hasattr(self.scheduler, "precondition_outputs") and "sigma_data" in self._config

    @property
    def _kind(self) -> PredictionType:
        return "edm" if self._is_edm else DiffusersSchedule(self.scheduler).prediction

    def _started(self, steps: int, device: torch.device | str = "cpu") -> Any:
        scheduler: Any = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    def _time_scale(self, schedule: Schedule) -> float:
        """Return the module's time for one timestep of the scheduler.

        Raises:
            ValueError: If the schedule is not the scheduler's process.
        """
        if self._is_edm:
            fits, wanted = isinstance(schedule, EDM | VE), "EDM() or VE()"
        else:
            own = DiffusersSchedule(self.scheduler)
            if own.is_flow and isinstance(schedule, RectifiedFlow):
                return 1 / own.steps
            fits = isinstance(schedule, DiffusersSchedule) and own.is_same_process(schedule)
            others = "RectifiedFlow() or a flow" if own.is_flow else "a DiffusersSchedule"
            wanted = f"{others} of {own.steps} steps" + ("" if own.is_flow else " and its betas")
        if not fits:
            raise ValueError(
                f"`schedule` must be {wanted} for {type(self.scheduler).__name__} as the solver, "
                f"got {type(schedule).__name__}: use another scheduler or schedule, or a solver "
                f"for all schedules, as DPMSolver2M()."
            )
        return 1.0

    def _rehearse(self) -> None:
        """Raise if the scheduler does not step from noise to data given an output alone."""
        try:
            scheduler = self._started(4)
            x = torch.zeros(1, 1, 2, 2)
            for t in scheduler.timesteps:
                x = scheduler.step(_scaled(scheduler, x, t), t, x).prev_sample
            reason = None if x.shape == (1, 1, 2, 2) else f"it returns shape {tuple(x.shape)}"
            times = scheduler.timesteps
            if float(times[0]) <= float(times[-1]):
                reason = "it goes from data to noise"
            if "prev_timestep" in inspect.signature(scheduler.step).parameters:
                reason = "it must be told where each step ends"
            if "noise_sampler_seed" in self._config:
                reason = "it draws noise for a whole batch from its own seed"
        except Exception as error:  # whatever a scheduler raises
            raise self._refusal("step from noise to data", error) from error
        if reason is not None:
            raise self._refusal("step from noise to data", reason)

    def _refusal(self, duty: str, reason: Any) -> ValueError:
        said = " ".join(str(reason).split())[:200]
        return ValueError(
            f"`scheduler` must {duty}, but {type(self.scheduler).__name__} does not ({said}): "
            f"change its settings, or use another one, as DPMSolverMultistepScheduler()."
        )


class _Network:
    """The output that a network would have for a scheduler, from the denoiser of a problem."""

    def __init__(
        self,
        problem: Problem,
        kind: PredictionType,
        time_scale: float,
        config: Mapping[str, Any],
    ) -> None:
        self._problem, self._kind, self._time_scale = problem, kind, time_scale
        self._sigma_data = float(config["sigma_data"]) if kind == "edm" else 1.0
        is_negative = kind == "edm" and config["prediction_type"] == "v_prediction"
        self._sign = -1.0 if is_negative else 1.0

    def __call__(self, xt: Tensor, timestep: Tensor) -> Tensor:
        schedule = self._problem.schedule
        is_edm = self._kind == "edm"
        t = schedule.time(torch.exp(4 * timestep)) if is_edm else self._time_scale * timestep
        x0 = self._problem.denoiser(xt, t.to(xt.dtype).to(xt.device).expand(len(xt)))
        if float(schedule.alpha(t)) == 0 and not bool(x0.isfinite().all()):
            raise ValueError(
                "`prediction` must say what x0 is where x_t is noise alone, at the first timestep "
                "of a flow scheduler, but the estimate is not finite: train with 'velocity', or "
                "use a solver of this package, as Heun()."
            )
        scales = prediction(self._kind, schedule, t[None], self._sigma_data)
        # float64 where the device has it: at low noise the difference is small
        wide = torch.float32 if xt.device.type == "mps" else torch.float64
        output = (x0.to(wide) - float(scales.a) * xt.to(wide)) * (self._sign / float(scales.b))
        return output.to(xt.dtype)


def _scaled(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """Return what a scheduler gives to the network; it also tells the scheduler where it is."""
    scale = getattr(scheduler, "scale_model_input", None)
    return x if scale is None else scale(x, t)
