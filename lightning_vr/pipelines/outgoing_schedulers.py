"""The scheduler of diffusers that samples as a trained model does.

A network is trained to be called with ``embedding_time(t)`` at the noise level of t. A scheduler
calls it with its own timestep at its own noise level, so it is the right one if both agree at each
of its timesteps, and if it makes the same x0_hat of the output.

======================  ===============  =======================================================
schedule                prediction       scheduler
======================  ===============  =======================================================
DiffusersSchedule       its own          the one it was made of
VP, Cosine              epsilon, v, x0   DDIMScheduler: ``alphas_cumprod[k] = alpha(k / 1000)²``
RectifiedFlow           velocity         FlowMatchEulerDiscreteScheduler
EDM, VE                 edm              EDMEulerScheduler, whose timestep is log(sigma) / 4
======================  ===============  =======================================================

Timestep 0 of a table would have no noise: it stands for half a timestep. For EDM and VE the time
that the network gets is an affine function of the scheduler's timestep, which is the timestep
itself for ``EDM(embedding_scale=1)``. In ``z = x_t / alpha`` EDM's preconditioning is the same for
every schedule, but VP's and the cosine's times are no affine function of log(sigma).
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch

from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.objective import Objective
from lightning_vr.process.reverse_steps import Variance
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import EDM, VE, VP, Cosine, RectifiedFlow, Schedule
from lightning_vr.process.solvers import DDPM

STEPS = 1000
"""Timesteps of a scheduler that stands for a continuous time from 0 to 1."""

_TABLE_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
_VARIANCE_TYPES: dict[Variance, str] = {
    "learned": "learned_range",
    "beta": "fixed_large",
    "beta_tilde": "fixed_small",
}
_FIRST, _LAST = 1 / STEPS, (STEPS - 1) / STEPS
_KNOWN = (DiffusersSchedule, EDM, VE, VP, Cosine, RectifiedFlow)


@dataclass(frozen=True)
class OutgoingScheduler:
    """A scheduler, and the times that the network gets.

    Attributes:
        scheduler: A scheduler of diffusers.
        time_scale: Factor on its timesteps.
        time_shift: What is added to that.
        noise_levels: Noise levels of the sampler where the scheduler has others, or None.
    """

    scheduler: Any
    time_scale: float = 1.0
    time_shift: float = 0.0
    noise_levels: list[float] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the network gets the scheduler's timesteps themselves, as diffusers calls it."""
        return self.time_scale == 1 and self.time_shift == 0


def outgoing_scheduler(
    objective: Objective, sampler: Sampler, *, learns_variance: bool = False
) -> OutgoingScheduler:
    """Return the scheduler that samples from a network of this objective.

    Args:
        objective: What the network was trained for.
        sampler: How samples are drawn: EDM's scheduler takes over the grid of noise levels, a
            table's the variance of the solver ``DDPM``.
        learns_variance: Whether the network was trained with ``LearnedVariance``.

    Raises:
        ValueError: If none samples rightly.
    """
    schedule, prediction = objective.schedule, objective.prediction
    if type(schedule) not in _KNOWN:  # a subclass may have other times
        raise ValueError(
            f"`schedule` must be one of this package to be exported, got "
            f"{type(schedule).__name__}, for which diffusers has no scheduler: use the format "
            f"safetensors."
        )
    if isinstance(schedule, DiffusersSchedule):
        if isinstance(sampler.solver, DDPM):
            return OutgoingScheduler(_ddpm(schedule, **_settings(sampler.solver)))
        if learns_variance and sampler.solver is None:
            return OutgoingScheduler(_ddpm(schedule, variance_type=_VARIANCE_TYPES["learned"]))
        own: Any = schedule.scheduler
        return OutgoingScheduler(_rebuilt(type(own), own.config))
    if isinstance(schedule, EDM | VE):
        _check(schedule, prediction, ("edm",))
        return _edm(schedule, objective.sigma_data, sampler)
    if isinstance(schedule, RectifiedFlow):
        _check(schedule, prediction, ("velocity",))
        return OutgoingScheduler(_new("FlowMatchEulerDiscreteScheduler", num_train_timesteps=STEPS))
    _check(schedule, prediction, tuple(_TABLE_PREDICTIONS))
    return OutgoingScheduler(_table(schedule, _TABLE_PREDICTIONS[prediction]))


def _check(schedule: Schedule, prediction: str, allowed: tuple[str, ...]) -> None:
    """Raise if no scheduler takes the prediction, or a scheduler has times outside of training."""
    name = type(schedule).__name__
    if prediction not in allowed:
        raise ValueError(
            f"`prediction` must be {' or '.join(map(repr, allowed))} to be exported with {name}, "
            f"as no scheduler of diffusers takes another there, got {prediction!r}: train with one "
            f"of these, or use the format safetensors."
        )
    if isinstance(schedule, Cosine | RectifiedFlow):
        low, high = schedule.t_min, schedule.t_max
        if not (low <= _FIRST * (1 + 1e-6) and high >= _LAST * (1 - 1e-6)):
            raise ValueError(
                f"`t_min` and `t_max` of {name} must be at most {_FIRST} and at least {_LAST} to "
                f"be exported, as diffusers samples from all of its timesteps, got {low} and "
                f"{high}: train with these, or use the format safetensors."
            )


def _table(schedule: Schedule, prediction_type: str) -> Any:
    times = torch.arange(STEPS, dtype=torch.float64) / STEPS
    times[0] = min(schedule.t_min, 0.5 / STEPS)
    kept = schedule.alpha(times) ** 2
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return _new(
        "DDIMScheduler",
        num_train_timesteps=STEPS,
        trained_betas=betas.tolist(),
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",  # the only one that begins at the last timestep
        steps_offset=1,  # which it does without, and StableDiffusionPipeline not
    )


def _settings(solver: DDPM) -> dict[str, Any]:
    """Return the settings of a DDPMScheduler that makes the steps of a solver."""
    return {
        "variance_type": _VARIANCE_TYPES[solver.variance],
        "clip_sample": solver.clip_sample,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
    }


def _ddpm(schedule: DiffusersSchedule, **changes: Any) -> Any:
    """Return a DDPMScheduler with the settings of a schedule's own scheduler but for some.

    Raises:
        ValueError: If it cannot have the schedule's table or prediction.
    """
    import diffusers  # which takes seconds

    own: Any = schedule.scheduler
    found = _rebuilt(diffusers.DDPMScheduler, own.config, **changes)
    live = DiffusersSchedule(found)
    if live.prediction == schedule.prediction and live.is_same_process(schedule):
        return found
    raise ValueError(
        f"`schedule` must have the table of a DDPMScheduler to be exported with a variance, got a "
        f"{type(own).__name__} whose settings give that another one: use a solver other than DDPM, "
        f"or the format safetensors."
    )


def _rebuilt(kind: Any, config: Any, **changes: Any) -> Any:
    """Return a scheduler of a configuration: ``from_config`` loses what was given by place."""
    known = inspect.signature(kind).parameters
    kept = {name: value for name, value in config.items() if name in known}
    return kind(**(kept | changes))


def _edm(schedule: EDM | VE, sigma_data: float, sampler: Sampler) -> OutgoingScheduler:
    levels = sampler.noise_levels(schedule)
    high, low = (_rounded(float(level)) for level in levels[[0, -1]])
    scheduler = _new(
        "EDMEulerScheduler",
        sigma_min=low,
        sigma_max=high,
        sigma_data=sigma_data,
        sigma_schedule="exponential" if sampler.grid == "exponential" else "karras",
        rho=sampler.rho,
    )
    scheduler.set_timesteps(len(levels))
    is_own = torch.allclose(scheduler.sigmas[:-1].double(), levels, rtol=1e-5)
    given = None if is_own else levels.tolist()
    if isinstance(schedule, EDM):
        return OutgoingScheduler(scheduler, schedule.embedding_scale, noise_levels=given)
    ratio = math.log(schedule.sigma_max / schedule.sigma_min)
    scale, shift = 4000 / ratio, -1000 * math.log(schedule.sigma_min) / ratio
    return OutgoingScheduler(scheduler, scale, shift, given)


def _rounded(level: float) -> float:
    """Undo the rounding of a power of a root."""
    return float(f"{level:.12g}")


def _new(name: str, **settings: Any) -> Any:
    import diffusers  # which takes seconds

    return getattr(diffusers, name)(**settings)
