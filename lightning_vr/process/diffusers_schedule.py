"""The schedule of a diffusers scheduler, so that its networks train and sample unchanged.

Two families: a table of ``alphas_cumprod`` (DDPM and its relatives), the variance-preserving
process ``alpha² = alphas_cumprod`` at the timesteps ``0 .. steps - 1``, with log noise level
interpolated linearly between two of them; and flow matching, ``sigma = t / steps``, ``alpha = 1 -
sigma``, which multistep schedulers follow with ``use_flow_sigmas``. Euler schedulers and their
relatives keep ``x_t / alpha`` as their state, and scale it to the same x_t before the network sees
it. What a scheduler changes for sampling alone (Karras sigmas, spacing, thresholds) plays no part.
"""

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_vr.core.validation import check_positive, described
from lightning_vr.process.predictions import PredictionType
from lightning_vr.process.schedules import RectifiedFlow, Schedule, is_diffusers_scheduler
from lightning_vr.process.timesteps import Density, Shifted, Uniform, UniformSteps

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_PREDICTIONS: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
"""What a network predicts: diffusers' name, and that of ``predictions.py``."""


class DiffusersSchedule(Schedule):
    """alpha and sigma of a diffusers scheduler, in the scheduler's own timesteps.

    The velocity of a flow-matching scheduler is ``noise - x0``, as diffusers defines it: its
    derivatives are taken with respect to sigma, not to the timestep. The ``shift`` of such a
    scheduler shapes the default density of t, as it spaces the scheduler's own timesteps.

    Args:
        scheduler: A diffusers scheduler, for example ``DDPMScheduler()``.

    Raises:
        ValueError: If the scheduler is of neither family, if it adds no noise at a timestep or
            leaves no signal, or if its networks get other times or predict something else.
    """

    log_noise_level: Tensor

    def __init__(self, scheduler: "SchedulerMixin") -> None:
        super().__init__()
        if not is_diffusers_scheduler(type(scheduler)):
            raise ValueError(
                f"`scheduler` must be a diffusers scheduler, got {described(scheduler)}: use "
                f"one, as DDPMScheduler()."
            )
        self.scheduler = scheduler
        self._config = _config(scheduler)
        self.is_flow = _is_flow(scheduler)
        table = torch.zeros(0) if self.is_flow else _log_noise_levels(scheduler)
        self.register_buffer("log_noise_level", table, persistent=False)
        self.steps = int(self._config["num_train_timesteps"]) if self.is_flow else len(table)
        self.prediction = self._prediction()
        flow = RectifiedFlow()
        self.t_min = self.steps * flow.t_min if self.is_flow else 0.0
        self.t_max = self.steps * flow.t_max if self.is_flow else self.steps - 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Follow the device but no change of precision: noise levels need more than 16 bits."""

        def move(x: Tensor) -> Tensor:
            found = fn(x)
            return found if found.dtype == x.dtype else x.to(found.device)

        return super()._apply(move, *args, **kwargs)  # type: ignore[no-untyped-call]

    def alpha(self, t: Tensor) -> Tensor:
        if self.is_flow:
            return 1 - t / self.steps
        return torch.sigmoid(-2 * self._interpolate(t)).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        if self.is_flow:
            return t / self.steps
        return torch.sigmoid(2 * self._interpolate(t)).sqrt().to(t.dtype)

    def alpha_derivative(self, t: Tensor) -> Tensor:
        if self.is_flow:
            return -torch.ones_like(t)
        return -self._slope(t) * self.alpha(t) * self.sigma(t) ** 2

    def sigma_derivative(self, t: Tensor) -> Tensor:
        if self.is_flow:
            return torch.ones_like(t)
        return self._slope(t) * self.sigma(t) * self.alpha(t) ** 2

    def time(self, noise_level: Tensor) -> Tensor:
        if self.is_flow:
            return self.steps / (1 + 1 / noise_level)
        table = self.log_noise_level.to(noise_level.device)
        level = torch.log(noise_level.double())
        above = torch.searchsorted(table, level).clamp(1, self.steps - 1)
        low, high = table[above - 1], table[above]
        time = above - 1 + ((level - low) / (high - low)).clamp(0, 1)
        return time.to(noise_level.dtype)

    def embedding_time(self, t: Tensor) -> Tensor:
        """Return ``t`` itself: the network was made for the scheduler's timesteps."""
        return t

    def default_timesteps(self) -> Density:
        """Return the density of the scheduler's own timesteps.

        Raises:
            ValueError: If the scheduler shifts them by the size of each picture.
        """
        if not self.is_flow:
            return UniformSteps(self.steps)
        if self._config.get("use_dynamic_shifting"):
            raise ValueError(
                "`timesteps` must be given for a scheduler of `use_dynamic_shifting`, whose shift "
                "depends on the size of the picture, got None: give it, as in "
                f"Shifted(Uniform(0.001, 0.999), shift=3.0, end={self.steps}), or set "
                "`use_dynamic_shifting` to False and `shift` to that of your pictures."
            )
        shift = self._shift()
        if shift == 1:
            return Uniform(self.t_min, self.t_max)
        low, high = (t / (shift * (self.steps - t) + t) for t in (self.t_min, self.t_max))
        return Shifted(Uniform(low, high), shift, self.steps)

    def check_prediction(self, prediction: str) -> None:
        """Raise if a network for ``prediction`` is not one for the scheduler."""
        if prediction != self.prediction:
            name = type(self.scheduler).__name__
            stated = self._config.get("prediction_type")
            reason = "" if stated is None else f" of prediction_type={stated!r}"
            raise ValueError(
                f"`prediction` must be {self.prediction!r}, as its {name}{reason} takes the "
                f"network's output, got {prediction!r}: set `prediction` to {self.prediction!r}, "
                f"or use another scheduler."
            )

    def is_same_process(self, other: "DiffusersSchedule") -> bool:
        """Return whether another scheduler has the same alpha and sigma at the same timesteps."""
        if (self.is_flow, self.steps) != (other.is_flow, other.steps):
            return False
        own, table = self.log_noise_level, other.log_noise_level.to(self.log_noise_level.device)
        return torch.allclose(own, table, rtol=1e-5, atol=1e-5)

    def _prediction(self) -> PredictionType:
        stated = self._config.get("prediction_type")
        if stated is None:  # of schedulers that know one alone
            return "velocity" if self.is_flow else "epsilon"
        if stated not in _PREDICTIONS:
            raise ValueError(
                f"`prediction_type` of the scheduler must be one of {', '.join(_PREDICTIONS)}, "
                f"got {stated!r}: use another scheduler."
            )
        return _PREDICTIONS[stated]

    def _shift(self) -> float:
        stated = self._config.get("flow_shift", self._config.get("shift", 1.0))
        check_positive("shift", stated)
        if isinstance(getattr(type(self.scheduler), "shift", None), property):
            now = self.scheduler.shift
            if now != stated:  # its configuration would rebuild another one
                raise ValueError(
                    f"`shift` of the scheduler must be the one that it was built with, {stated}, "
                    f"got {now} by `set_shift`: build it with shift={now}."
                )
        return float(stated)

    def _below(self, t: Tensor) -> Tensor:
        return t.double().floor().long().clamp(0, self.steps - 2)

    def _interpolate(self, t: Tensor) -> Tensor:
        table, below = self.log_noise_level.to(t.device), self._below(t)
        return torch.lerp(table[below], table[below + 1], t.double() - below)

    def _slope(self, t: Tensor) -> Tensor:
        table, below = self.log_noise_level.to(t.device), self._below(t)
        return (table[below + 1] - table[below]).to(t.dtype)


def as_schedule(schedule: Any) -> Schedule:
    """Return a schedule, of a diffusers scheduler its ``DiffusersSchedule``.

    Raises:
        ValueError: If it is neither.
    """
    if is_diffusers_scheduler(type(schedule)):
        return DiffusersSchedule(schedule)
    if isinstance(schedule, Schedule):
        return schedule
    raise ValueError(
        f"`schedule` must be a schedule or a diffusers scheduler, got {described(schedule)}: use "
        f"EDM() or another schedule of this package, or DiffusersSchedule(scheduler)."
    )


def _config(scheduler: Any) -> Mapping[str, Any]:
    config: Mapping[str, Any] = getattr(scheduler, "config", {})
    return config


def _is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler follows ``x_t = (1 - t / steps) x0 + (t / steps) noise``.

    Raises:
        ValueError: If it follows neither that nor a table.
    """
    config, name = _config(scheduler), type(scheduler).__name__
    if config.get("stages", 1) != 1:
        raise ValueError(
            f"`scheduler` must follow one process, got {name} of {config['stages']} stages of "
            f"resolution: use FlowMatchEulerDiscreteScheduler()."
        )
    if config.get("invert_sigmas"):
        raise ValueError(
            f"`scheduler` must have noise at its last timestep, got {name} of invert_sigmas=True: "
            f"set `invert_sigmas` to False."
        )
    if config.get("timestep_type") == "continuous" and config["prediction_type"] == "v_prediction":
        raise ValueError(
            f"`scheduler` must give the network timesteps, got {name} of "
            f"timestep_type='continuous', which gives it logarithms of sigma: use EDM() instead."
        )
    if config.get("use_flow_sigmas") or (
        hasattr(scheduler, "scale_noise") and _interpolates(scheduler)
    ):
        return True
    if hasattr(scheduler, "alphas_cumprod"):
        return False
    own = (
        "EDM() or VE() instead"
        if {"sigma_max", "sigma_data"} & config.keys()
        else "DDPMScheduler()"
    )
    raise ValueError(
        f"`scheduler` must have a table `alphas_cumprod` of timesteps, or follow a flow from data "
        f"to noise, got {name}: use {own}, or FlowMatchEulerDiscreteScheduler() for a flow."
    )


def _interpolates(scheduler: Any) -> bool:
    """Return whether a scheduler's own ``scale_noise`` mixes sample and noise as a flow does."""
    steps = _config(scheduler).get("num_train_timesteps")
    times = getattr(scheduler, "timesteps", None)
    if steps is None or not isinstance(times, Tensor) or len(times) == 0:
        return False
    found = []
    t = times[[0, len(times) // 2, -1]].float()
    zero, one = torch.zeros(1, 1, device=t.device), torch.ones(1, 1, device=t.device)
    for i in range(3):
        # where a scheduler stands in sampling counts for more than the time that it is given
        own = copy.copy(scheduler)
        own._step_index = own._begin_index = None
        found.append(own.scale_noise(zero, t[i : i + 1], one))
    return torch.allclose(torch.cat(found)[:, 0], t / steps, rtol=1e-4)


def _log_noise_levels(scheduler: Any) -> Tensor:
    kept = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64).cpu()
    if not bool(torch.isfinite(kept).all()) or kept.ndim != 1 or len(kept) < 2:
        raise ValueError(
            f"`scheduler` must have two or more timesteps and finite betas, got `alphas_cumprod` "
            f"of shape {tuple(kept.shape)} from {float(kept.min()):g}: change its betas."
        )
    if _config(scheduler).get("rescale_betas_zero_snr") or bool((kept <= 0).any()):
        raise ValueError(
            f"`scheduler` must keep some signal at its last timestep, got alphas_cumprod of "
            f"{float(kept.min()):g}: set its `rescale_betas_zero_snr` to False, or its last beta "
            f"below 1."
        )
    if bool(kept[0] >= 1):
        raise ValueError(
            f"`scheduler` must add noise at its first timestep, got alphas_cumprod of "
            f"{float(kept[0]):g}: set its `beta_start`, or the first of `trained_betas`, to 1e-6 "
            f"or more."
        )
    if not bool((kept.diff() < 0).all()):
        first = int((kept.diff() >= 0).nonzero()[0]) + 1
        raise ValueError(
            f"`scheduler` must add noise at each timestep, but adds none at {first}, as its beta "
            f"there is {1 - float(kept[first] / kept[first - 1]):g}: set its betas to 1e-6 or more."
        )
    return 0.5 * (torch.log1p(-kept) - torch.log(kept))
