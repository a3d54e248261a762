"""Fitting a Taylor control variate while a module trains: coefficients, cost and gate.

A pilot takes the batch of the step that is about to come, makes draws of its own as training would,
and sorts them into bins of the noise level. In each bin it takes the gradient of the loss and those
of the parts of the control variate by ordinary backward passes; their inner products are all that
``estimators.control_fit`` needs. Two random vectors of effective dimension ``d_eff`` are orthogonal
up to ``1 / sqrt(d_eff)``, however many draws each is the mean of: so a few draws for each bin do,
and a pilot takes about as long as a step or two with the control variate. Samples of small batches
are drawn several times.

Before the first pilot a step is timed without the control variate, with it for half of the bins and
for all. What that and the pilots take is a small share of the time of the run, half of which may be
spent in advance: early in training much changes.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_vr.checks import check_derivatives
from lightning_vr.distributed import all_reduce_sum, world_size
from lightning_vr.estimators.chunks import gradients_in_chunks
from lightning_vr.estimators.control_fit import Cost, Findings
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.estimators.taylor import TaylorCV
from lightning_vr.estimators.taylor_terms import constant_term
from lightning_vr.noisy_losses import DiffusionLoss
from lightning_vr.precision import loss_scale
from lightning_vr.rng import undisturbed
from lightning_vr.sinks import level_names, log_numbers
from lightning_vr.timing import timed
from lightning_vr.types import Clean, Noised, TargetEstimate
from lightning_vr.variance.gradients import Source, parameter_groups
from lightning_vr.variance.moments import widest_float
from lightning_vr.variance.rows import Rows, concatenated, mapped, row_count, tensors

if TYPE_CHECKING:
    from lightning_vr.module import DiffusionModule

_LEAST_DRAWS = 16
"""Draws for each bin of a pilot, up to which samples are drawn again."""

_SHARE, _OPEN_SHARE = 0.02, 0.05
"""Share of the time of training that fits may take, with the gate closed and with it open."""

_TIMING = 8
"""About how many steps it takes to time a control variate of order 0."""

_UNKNOWN_STEPS = 10_000
"""Steps that a run without an end counts as, until it has taken more."""

_ROUNDS = 2

Function = Callable[[Rows], Tensor]
"""From rows to a loss of each ``(n,)``."""


class ControlMeasurement:
    """Measures what a control variate explains of a module's gradients, and what it costs.

    Args:
        module: A module that is training.
        control: The control variate in its slot.
    """

    def __init__(self, module: "DiffusionModule", control: TaylorCV) -> None:
        self.module, self.control = module, control
        self.loss = DiffusionLoss(module, module.trainer.precision_plugin.forward_context)
        groups = parameter_groups(module)[1]
        self._groups = groups if control.by_group else [0] * len(groups)
        self.seconds: list[float] = []

    @property
    def steps_together(self) -> int:
        """Parts of an optimizer step: ranks times accumulated batches."""
        return world_size() * int(self.module.trainer.accumulate_grad_batches)

    def find(self, clean: Clean, source: Source) -> Findings:
        """Return what a pilot finds on a batch, the same on all ranks; all must call it.

        Args:
            clean: B clean samples.
            source: Gives generators by key.
        """
        units = self._units(len(clean.x0))
        rows = [self._draw(clean, partial(source, unit)) for unit in range(units)]
        everything = concatenated(rows)
        own, total = self._by_bin(everything)
        # N draws stand for those of a step, which are fewer or more
        scale = units / self.steps_together
        whole = _square(total)
        if units > 1:
            one = _square(self._gradient(self._plain, rows[0]))
            mean = (units * whole - one) / (units - 1)
            whole = mean + (one - mean) / self.steps_together
        found = Findings(
            own.products * scale, own.squares * scale, own.loss_squares * scale, whole, *own[4:]
        )
        return Findings(*(self._mean_over_ranks(x) for x in found))

    def cost(self, clean: Clean, encode: Callable[[], Any], source: Source) -> tuple[Cost, float]:
        """Return what the control variate costs, and the seconds of a step without it.

        Args:
            clean: An encoded batch.
            encode: Encodes it.
            source: Gives generators by key.
        """
        rows = self._draw(clean, source)
        number = torch.arange(self.control.bins)
        some = number % 2 == 0
        masks = (number < 0, some, number >= 0)
        steps = [partial(self._with_gate, mask, rows) for mask in masks]
        calls: list[Callable[[], Any]] = [*steps, encode]
        times = [[timed(call, self.module.device)[1] for call in calls] for _ in range(_ROUNDS)]
        found = torch.tensor(times, dtype=torch.float64).min(dim=0).values
        plain, half, whole, encoding = self._mean_over_ranks(found).tolist()
        bins = self.control.bin(rows["noised"]["t"], self.module.objective)
        share = float(some[bins.cpu()].double().mean())
        marginal = max(0.0, whole - half) / max(1 - share, 1e-3)
        fixed = max(0.0, half - plain - share * marginal)
        step = plain + encoding
        return Cost(fixed / step, marginal / step), step

    def _units(self, samples: int) -> int:
        """Return how many times samples are drawn; accumulated gradients need two sizes."""
        draws = samples * self.module.draws.draws_per_sample
        wanted = math.ceil(_LEAST_DRAWS * self.control.bins / draws)
        return max(wanted, 1 if self.steps_together == 1 else 2)

    @torch.no_grad()
    def _draw(self, clean: Clean, source: Source) -> Rows:
        times = self.loss.times(clean, source("times"), 0.0, 1.0)
        return self.loss.draw(clean, times, source("noise"))

    def _by_bin(self, rows: Rows) -> tuple[Findings, list[Tensor]]:
        """Return sums of products of gradients of each bin's part of the mean, and the gradient."""
        count, control = row_count(rows), self.control
        bins = control.bin(rows["noised"]["t"], self.module.objective)
        shape = (control.bins, max(self._groups) + 1, control.parts)
        products = torch.zeros(shape, dtype=torch.float64)
        squares = torch.zeros(*shape, control.parts, dtype=torch.float64)
        loss_squares, shares, *values = torch.zeros(4, control.bins, dtype=torch.float64)
        total: list[Tensor] = []
        for b in range(control.bins):
            index = (bins == b).nonzero()[:, 0]
            if not len(index):
                continue
            some = mapped(rows, lambda x: x[index])  # noqa: B023
            shares[b] = len(index) / count
            loss, gradient = self._losses_and_gradient(self._plain, some, count)
            total = [x + y for x, y in zip(total, gradient, strict=True)] if total else gradient
            loss_squares[b] = _square(gradient)
            found = [
                self._losses_and_gradient(partial(self._part, part), some, count)
                for part in range(control.parts)
            ]
            for part, (_, own) in enumerate(found):
                products[b, :, part] = self._by_group(gradient, own)
                for other in range(part + 1):
                    squares[b, :, part, other] = self._by_group(found[other][1], own)
                    squares[b, :, other, part] = squares[b, :, part, other]
            constant = constant_term(Noised(**some["noised"]), self.module.objective)
            explained = constant + sum(terms for terms, _ in found)
            values[0][b] = float(((loss - loss.mean()) * explained).sum())
            values[1][b] = float(explained.square().sum())
        nothing = torch.zeros((), dtype=torch.float64)
        return Findings(products, squares, loss_squares, nothing, shares, *values), total

    def _by_group(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Return the inner product of two gradients, in each group of parameters."""
        found = torch.zeros(max(self._groups) + 1, dtype=torch.float64)
        for group, x, y in zip(self._groups, a, b, strict=True):
            found[group] += float((x * y).sum())
        return found

    def _plain(self, rows: Rows) -> Tensor:
        noised, target = Noised(**rows["noised"]), TargetEstimate(**rows["target"])
        with self.loss.precision():
            module = self.module
            return diffusion_loss(module.predict, noised, target, module.objective).per_draw

    def _part(self, part: int, rows: Rows) -> Tensor:
        noised = Noised(**rows["noised"])
        with self.loss.precision():
            return self.control.terms(self.module.predict, noised, self.module.objective)[:, part]

    def _with_gate(self, is_open: Tensor, rows: Rows) -> None:
        """Take the gradient of a step with the gate open in some bins."""
        kept, self.control.fit.is_open = self.control.fit.is_open, is_open
        try:
            self._gradient(self.loss, rows)
        finally:
            self.control.fit.is_open = kept

    def _gradient(self, function: Function, rows: Rows) -> list[Tensor]:
        return self._losses_and_gradient(function, rows, row_count(rows))[1]

    def _losses_and_gradient(
        self, function: Function, rows: Rows, count: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return losses ``(n,)`` and the gradient of their sum over ``count``."""
        module, device = self.module, self.module.device
        aliases = {
            n: p.detach().requires_grad_() for n, p in module.named_parameters() if p.requires_grad
        }
        buffers = {name: x.clone() for name, x in module.named_buffers()}
        take = partial(
            gradients_in_chunks,
            module,
            function,
            rows,
            self.loss.chunk(row_count(rows), device),
            aliases=aliases,
            buffers=buffers,
            scale=loss_scale(module.trainer),
        )
        (losses, found), seconds = timed(take, device)
        self.seconds.append(seconds)
        share = row_count(rows) / count
        zeros = (torch.zeros_like(p) for p in aliases.values())
        return losses, [z if g is None else g * share for g, z in zip(found, zeros, strict=False)]

    def mean(self, value: float) -> float:
        """Return the mean of a number over the ranks; all must call it."""
        return float(self._mean_over_ranks(torch.tensor(value, dtype=torch.float64)))

    def _mean_over_ranks(self, values: Tensor) -> Tensor:
        device = self.module.device
        total = all_reduce_sum(values.to(device, widest_float(device))) / world_size()
        return total.cpu().double()


class ControlPilot:
    """Fits a control variate while a module trains.

    Args:
        module: A module that is training with ``control``.
        control: Its control variate.
    """

    def __init__(self, module: "DiffusionModule", control: TaylorCV) -> None:
        self.module, self.control = module, control
        self.measurement = ControlMeasurement(module, control)
        self._is_checked = False

    def before_step(self, batch: Any) -> None:
        """Fit if it is time; all ranks must call it before each optimizer step."""
        step = self.module.global_step
        if self._is_checked and not self._is_due(step):
            return
        with undisturbed():
            clean = detached(self.module.clean(batch))
            if not self._is_checked:
                check_derivatives(self.module, clean)
                self._is_checked = True
            if self._is_due(step) and self.control.pilot is None:
                self._time(step, batch, clean)
            if self._is_due(step):
                self._fit(step, clean)

    def _is_due(self, step: int) -> bool:
        """Return whether it is time to fit, or first to time what that takes."""
        control, pilot = self.control, self.control.pilot
        if control.is_fixed or (pilot is not None and step < pilot["next"]):
            return False
        if control.refit_every_n_steps is not None:
            return True
        if pilot is None:
            return self._affordable(step) >= _TIMING
        return pilot["spent"] + pilot["steps"] <= self._affordable(step)

    def _affordable(self, step: float) -> float:
        """Return how many steps' time fits may have taken: half of it is given in advance."""
        planned = min(self.module.trainer.estimated_stepping_batches, max(step, _UNKNOWN_STEPS))
        return self._share * (step + planned) / 2

    @property
    def _share(self) -> float:
        return _SHARE if self.control.is_closed else _OPEN_SHARE

    def _time(self, step: int, batch: Any, clean: Clean) -> None:
        """Time steps, before the first fit."""
        control = self.control
        control.pilot = {"count": 0, "next": step, "spent": 0.0, "steps": 0.0, "seconds": 0.0}
        if control.gate != "auto" and control.refit_every_n_steps is not None:
            return
        source = partial(self.module.generator, "control variate", "timing")
        cost, seconds = self.measurement.cost(clean, lambda: self.module.clean(batch), source)
        passes = control.bins * (1 + control.parts * sum(cost))
        timing = _ROUNDS * (3 + 2 * cost.fixed + 1.5 * cost.marginal)
        control.pilot |= {"spent": timing, "steps": passes, "seconds": seconds}
        if control.gate == "auto":
            control.fit.cost = Cost(cost.fixed + _OPEN_SHARE, cost.marginal)
        left = self.module.trainer.estimated_stepping_batches
        if control.refit_every_n_steps is None and timing + passes > self._affordable(left):
            rank_zero_info(
                f"TaylorCV stays as it is: {left:.0f} steps are too few to find out where it pays, "
                f"with {_SHARE:.0%} of their time: set `refit_every_n_steps` to find out still."
            )

    def _fit(self, step: int, clean: Clean) -> None:
        control, fit, pilot = self.control, self.control.fit, self.control.pilot
        assert pilot is not None
        before = fit.is_open
        self.measurement.seconds = []
        fit.add(
            self.measurement.find(clean, partial(self.module.generator, "control variate", step))
        )
        if pilot["count"] == 0 and pilot["seconds"]:
            pilot["steps"] = self._steps(pilot["seconds"])
        self._schedule(step, pilot)
        log_numbers(self.module.trainer, gate_numbers(self.module, control))
        changed = pilot["count"] == 1 or not torch.equal(before, fit.is_open)
        if control.gate == "auto" and changed:
            rank_zero_info(f"TaylorCV at step {step}: {describe_gate(self.module, control)}")

    def _steps(self, seconds: float) -> float:
        """Return how many steps' time the pilot took; compiling in its first pass is no cost."""
        passes = self.measurement.seconds
        return self.measurement.mean(len(passes) * statistics.median(passes) / seconds)

    def _schedule(self, step: int, pilot: dict[str, float]) -> None:
        """Say when the next pilot is due: soon at first, when much changes, and then evenly."""
        pilot["count"] += 1
        pilot["spent"] += pilot["steps"]
        evenly = pilot["steps"] / (self._share / 2)
        apart = self.control.refit_every_n_steps or min(max(1, step), evenly)
        pilot["next"] = step + max(1, math.ceil(apart))


def control_pilot(module: "DiffusionModule") -> ControlPilot | None:
    """Return a pilot for a module with a Taylor control variate, else None."""
    control = module.control_variate
    return ControlPilot(module, control) if isinstance(control, TaylorCV) else None


def gate_numbers(module: "DiffusionModule", control: TaylorCV) -> dict[str, float]:
    """Return what has been fitted as numbers for loggers."""
    fit, names = control.fit, level_names(_levels(module, control))
    groups = parameter_groups(module)[0] if fit.coefficients.shape[1] > 1 else [""]
    found: dict[str, float] = {}
    if control.gate == "auto":
        found["control_variate/saving"] = fit.saving
        found["control_variate/share"] = float(fit.shares[fit.is_open].sum())
    for b, name in enumerate(names):
        if control.gate == "auto":
            found[f"control_variate/open/s{name}"] = float(fit.is_open[b])
        found[f"control_variate/reduction/s{name}"] = float(fit.reductions[b])
        for part, betas in zip(("odd", "even"), fit.coefficients[b].T.tolist(), strict=False):
            for group, beta in zip(groups, betas, strict=True):
                found[f"control_variate/{part}/{group}/s{name}".replace("//", "/")] = beta
    return found


def describe_gate(module: "DiffusionModule", control: TaylorCV) -> str:
    """Return in which bins it is on, and why, as a sentence."""
    fit, names = control.fit, level_names(_levels(module, control))
    assert fit.cost is not None
    price = f"for all draws it makes a step {1 + sum(fit.cost):.2f} times as long"
    if control.is_closed:
        return (
            f"off in all {control.bins} bins of the noise level: {price}, and the best choice of "
            f"bins is predicted to train {fit.saving:.2f} times as fast."
        )
    levels = ", ".join(name for name, is_open in zip(names, fit.is_open, strict=True) if is_open)
    return (
        f"on in {int(fit.is_open.sum())} of {control.bins} bins of the noise level, around s = "
        f"{levels}: {price}, and these bins are predicted to train {fit.saving:.2f} times as fast."
    )


def detached(clean: Clean) -> Clean:
    """Return samples without the graph of what made them."""
    return Clean(**mapped(tensors(clean), lambda x: x.detach() if isinstance(x, Tensor) else x))


def _levels(module: "DiffusionModule", control: TaylorCV) -> Tensor:
    """Return the noise level in the middle of each bin ``(bins,)``."""
    middle = (torch.arange(control.bins, dtype=torch.float64) + 0.5) / control.bins
    t = module.timesteps.icdf(middle.to(module.device, widest_float(module.device)))
    return module.schedule.noise_level(t).cpu()


def _square(gradient: list[Tensor]) -> Tensor:
    return torch.tensor(sum(float(g.square().sum()) for g in gradient), dtype=torch.float64)
