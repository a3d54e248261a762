"""Measuring how much a Taylor control variate explains of a model's gradients, and its cost.

The inner products that ``estimators.taylor.coefficients`` needs are taken in bins of the noise
level, between gradients of batches by ordinary backward passes. Each time is drawn with two noises,
z and z', and each gradient is the difference of the two: as ``E[c | x, t] = 0``,

    E⟨g(z) - g(z'), c(z) - c(z')⟩ = 2 E⟨g, c⟩,      E‖c(z) - c(z')‖² = 2 E‖c‖²,

and the effect of samples and times on g cancels. Where the control variate explains the noise
fully, its coefficient has no error. Two random vectors of effective dimension ``d_eff`` are
orthogonal up to ``1 / sqrt(d_eff)``, however many draws each is the mean of: so a few draws for
each bin suffice, and a measurement takes about as long as two steps with the control variate.
Samples of small batches are drawn several times.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_vr.core.devices import device_of, timed, widest_float
from lightning_vr.core.distributed import all_reduce_mean, least, world_size
from lightning_vr.core.gradients import mean_gradients
from lightning_vr.core.rows import Rows, concatenated, row_count, rows_at
from lightning_vr.core.types import Clean, Noised, TargetEstimate
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.estimators.taylor.coefficients import Cost, PilotStatistics
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.estimators.taylor.terms import constant_term
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.gradient_measurement import Source

_LEAST_DRAWS = 16
"""Draws for each bin; samples are drawn again until there are as many."""

_ROUNDS, _MOST_ROUNDS, _TIMING_SECONDS = 2, 5, 0.2
"""Rounds of timing: short steps, whose times scatter more, are timed more often."""

Function = Callable[[Rows], Tensor]
"""From rows to a number for each ``(n,)``."""


class ControlMeasurement:
    """Measures a control variate on a model.

    Args:
        model: A model that is training.
        control: The control variate in its slot.
        run: The run that it trains in.

    Attributes:
        seconds: What each pass of the last ``measure`` took, with an equal part of what lies
            between the passes: draws and inner products.
    """

    def __init__(self, model: Diffusion, control: TaylorCV, run: RunContext) -> None:
        self.model, self.control, self.run = model, control, run
        self.seconds: list[float] = []
        self._loss = DiffusionLoss(model, run.precision)

    def measure(self, clean: Clean, source: Source) -> PilotStatistics:
        """Return inner products of gradients, the same on all ranks; all must call it.

        Args:
            clean: B clean samples.
            source: Gives generators by key.
        """
        self.seconds = []
        found, total = timed(partial(self._measure, clean, source), device_of(self.model))
        between = (total - sum(self.seconds)) / len(self.seconds)
        self.seconds = [seconds + between for seconds in self.seconds]
        return found

    def cost(
        self, clean: Clean, encode: Callable[[], Any], source: Source
    ) -> tuple[Cost, float, float]:
        """Time steps without the control variate, with it for half of the bins, and for all.

        Args:
            clean: An encoded batch.
            encode: Encodes it.
            source: Gives generators by key.

        Returns:
            Its cost, the seconds of a step without it, and the seconds that timing took; the same
            on all ranks.
        """
        rows, number = self._draw(clean, source), torch.arange(self.control.bins)
        half = number % 2 == 0
        masks = (number < 0, half, number >= 0)
        calls: list[Callable[[], Any]] = [partial(self._with_gate, mask, rows) for mask in masks]
        calls.append(encode)
        times: list[list[float]] = []
        while len(times) < _ROUNDS or (
            len(times) < _MOST_ROUNDS and sum(map(sum, times)) < _TIMING_SECONDS
        ):
            times.append([timed(call, device_of(self.model))[1] for call in calls])
        found = torch.tensor(times, dtype=torch.float64)
        least, spent = self.over_ranks(found.min(dim=0).values), self.over_ranks(found.sum())
        plain, some, whole, encoding = least.tolist()
        bins = self.control.bin(rows["noised"]["t"], self.model.objective)
        fraction = float(self.over_ranks(half[bins.cpu()].double().mean()))
        step, total = plain + encoding, max(0.0, whole - plain)
        # the intercept of a line through both, with neither part below zero
        fixed = (some - plain - fraction * total) / max(1 - fraction, 1e-3)
        fixed = min(max(0.0, fixed), total)
        return Cost(fixed / step, (total - fixed) / step), step, float(spent)

    def over_ranks(self, values: Tensor) -> Tensor:
        """Return the mean of numbers over the ranks, float64; all must call it."""
        device = device_of(self.model)
        return all_reduce_mean(values.to(device, widest_float(device))).cpu().double()

    def _measure(self, clean: Clean, source: Source) -> PilotStatistics:
        resamples = self.model.draws.draws_per_sample
        wanted = math.ceil(_LEAST_DRAWS * self.control.bins / (2 * resamples))
        some = clean.rows(slice(0, max(wanted, len(clean.x0) // 2)))
        # all ranks draw equally often: the smallest batch says how often
        size = least(len(some.x0))
        units = [
            self._pairs(some, partial(source, "pairs", unit))
            for unit in range(math.ceil(wanted / size))
        ]
        rows = concatenated(units)
        in_step = len(clean.x0) * resamples * self._parts_of_step
        found = self._by_bin(rows, row_count(rows) / in_step)
        moment = found.loss_squares.sum() + self._rest(units[0], in_step)
        return PilotStatistics(*(self.over_ranks(x) for x in found._replace(second_moment=moment)))

    @property
    def _parts_of_step(self) -> int:
        """Batches of an optimizer step: ranks times accumulated ones."""
        return world_size() * self.run.accumulation()

    @torch.no_grad()
    def _draw(self, clean: Clean, source: Source) -> Rows:
        """Draw as a step does."""
        times = self._loss.times(clean, source("times"), 0.0, 1.0)
        return self._loss.draw(clean, times, source("noise"))

    @torch.no_grad()
    def _pairs(self, clean: Clean, source: Source) -> Rows:
        """Draw times and two noises for each: the first ones with sign 1, the others with -1."""
        times = self._loss.times(clean, source("times"), 0.0, 1.0)
        parts = []
        for number, sign in enumerate((1.0, -1.0)):
            rows = self._loss.draw(clean, times, source("noise", number))
            parts.append({**rows, "sign": torch.full_like(rows["noised"]["t"], sign)})
        return concatenated(parts)

    def _rest(self, rows: Rows, in_step: int) -> Tensor:
        """Return the part of ``E‖g‖²`` of a step that is not noise: samples, times and the mean.

        Products of gradients with independent noise on the same times contain ``‖E g‖²`` and the
        variance over samples and times, those of different samples ``‖E g‖²`` alone. Both use the
        draws that the noise is measured on, so that rare large ones are in both or in neither.

        Args:
            rows: Pairs.
            in_step: Draws of an optimizer step.
        """
        count = row_count(rows) // 2
        samples = count // self.model.draws.draws_per_sample
        cut = count // samples * (samples // 2)
        ends = [(0, cut), (cut, count)] if cut else [(0, count)]
        halves = [
            [
                self._gradient(self._unsigned, rows_at(rows, slice(noise + i, noise + j)))[1]
                for noise in (0, count)
            ]
            for i, j in ends
        ]
        same = torch.stack([_product(*half) for half in halves]).mean()
        if not cut:
            return same
        across = torch.stack([_product(a, b) for a in halves[0] for b in halves[1]]).mean()
        return across + (same - across) * (count / 2) / in_step

    def _by_bin(self, rows: Rows, scale: float) -> PilotStatistics:
        """Return the products of each bin's part of a gradient, for a step of another size.

        Args:
            rows: N draws with signs, each time with two noises.
            scale: N over the draws of a step.
        """
        control, count = self.control, row_count(rows)
        bins = control.bin(rows["noised"]["t"], self.model.objective)
        found = PilotStatistics.zeros(control.bins, control.parts)
        for b in range(control.bins):
            index = (bins == b).nonzero()[:, 0]
            if not len(index):
                continue
            some = rows_at(rows, index)
            fraction = len(index) / count
            factor = scale * fraction**2
            values, gradient = self._gradient(self._signed, some)
            parts = [
                self._gradient(partial(self._part, part), some) for part in range(control.parts)
            ]
            for k, (_, own) in enumerate(parts):
                found.products[b, k] = factor * _product_in_order(gradient, own)
                for j, (_, other) in enumerate(parts):
                    found.squares[b, k, j] = factor * _product_in_order(own, other)
            found.loss_squares[b] = factor * _product(gradient, gradient)
            found.fraction[b] = fraction
            loss = some["sign"] * values
            explained = some["sign"] * sum(terms for terms, _ in parts)
            explained = explained + constant_term(Noised(**some["noised"]), self.model.objective)
            found.value_products[b] = ((loss - loss.mean()) * explained).sum()
            found.value_squares[b] = explained.square().sum()
        return found

    def _unsigned(self, rows: Rows) -> Tensor:
        noised, target = Noised(**rows["noised"]), TargetEstimate(**rows["target"])
        with self._loss.precision():
            model = self.model
            return diffusion_loss(model.predict, noised, target, model.objective).per_draw

    def _signed(self, rows: Rows) -> Tensor:
        found: Tensor = self._unsigned(rows) * rows["sign"]
        return found

    def _part(self, part: int, rows: Rows) -> Tensor:
        noised = Noised(**rows["noised"])
        with self._loss.precision():
            terms = self.control.terms(self.model.predict, noised, self.model.objective)
        found: Tensor = terms[:, part] * rows["sign"]
        return found

    def _with_gate(self, is_open: Tensor, rows: Rows) -> None:
        """Take the gradient of a step with the gate open in some bins."""
        kept, self.control.fit.is_open = self.control.fit.is_open, is_open
        try:
            self._gradient(self._loss, rows)
        finally:
            self.control.fit.is_open = kept

    def _gradient(self, function: Function, rows: Rows) -> tuple[Tensor, list[Tensor]]:
        """Return the values of rows ``(n,)``, and the gradient of their mean."""
        device = device_of(self.model)
        chunk, scale = self._loss.chunk(row_count(rows), device), self.run.loss_scale()
        take = partial(mean_gradients, self.model, function, rows, chunk, scale=scale)
        (values, gradient, _), seconds = timed(take, device)
        self.seconds.append(seconds)
        return values, gradient


def _product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return _products(a, b).sum()


def _product_in_order(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Return the inner product of two gradients, summed parameter by parameter."""
    return _products(a, b).cumsum(dim=0)[-1]


def _products(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Return the inner product of each parameter's gradients, read from a device all at once."""
    found = torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)])
    return found.cpu().double()
