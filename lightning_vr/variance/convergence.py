"""How far a network is from its optimum at each noise level, on fixed draws.

At noise level s the loss of a network is ``λ E ‖x0_hat - x0‖² / d``, and with D = E[x0 | x_t]

    loss = λ V / d + λ E ‖x0_hat - D‖² / d,

the irreducible part (``optimum``) and the excess, without a cross term. The excess is therefore
measured as it stands, from the network's distance to D. The difference of loss and irreducible part
has the same mean, but per draw it carries the cross term ``2 ⟨x0_hat - D, D - x0⟩``, of a standard
deviation near ``2 √(excess · V)``; and it may be negative. The direct one is not negative, is 0 for
the exact denoiser whatever the data, and its error falls with the excess itself. The loss is
reported as excess plus irreducible part: averaged over x0 given x_t already.

**Any squared error can be measured so**, whatever the network predicts and whatever λ: a loss
``(x0, noise, t)`` that is quadratic in its target is asked for the loss at the same x_t made of
other parts, ``x0 = D`` and ``noise = (x_t - alpha D) / sigma``. It is the excess of that draw. λ
follows from a second difference along a line of such parts; the third must be 0, or the loss is no
squared error.

With D₁ of a subset in place of D (``optimum``) the distance is ``excess + E ‖D₁ - D‖²`` in the
mean: an upper bound, and loss = distance + E ‖x0 - D₁‖² holds as before, since D₁ is unbiased.
Held-out data have no such identity, as the network has seen the references and not them: their loss
is measured as it is.

**Standard errors** are between blocks of samples. Rare events that no draw met (x_t between two
samples at low noise) are no part of them: where few draws make up the irreducible part, a bound by
pairs of samples, or by the best linear denoiser, says what may be missing (``Population``). From a
subset the scatter of ‖x0‖² among the draws is taken out by a control variate, whose mean the subset
knows better than the draws; the error of that mean is added.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.types import Noised
from lightning_vr.process.schedules import expand
from lightning_vr.variance.convergence_curves import Floors, Record
from lightning_vr.variance.fixed_draws import FixedDraws, block_means, time_numbers
from lightning_vr.variance.optimum import Optimum, Population, own_optimum

Losses = Callable[[Noised], Tensor]
"""``draws (B, *) -> loss of each (B,)``, a squared error per dimension whatever its weight."""

_ENOUGH = 50
"""Effective number of draws below which an irreducible loss may hang on events that are missing."""

_ROUNDING = 32
"""Units in the last place by which a network's output may be off."""

_CUBIC = 0.02
"""Third difference of a squared error, relative to its size, that rounding may make."""


class ConvergenceMeasurement:
    """The optimum at fixed draws of a training set and of held-out data.

    Making it costs about ``6 N d`` operations for each draw, once; a validation costs a forward
    pass for each. Under DDP the ranks share out the draws, and all make and use it together.

    Args:
        train: Draws of the training set.
        held_out: Draws of other data, or None.
        population: What the optimum is computed from; None where no sample has exchangeable ones.
        losses: The loss, in evaluation mode and without gradient.
        batch_size: Largest number of draws at a time.
        device: Where the network is.
        scale: λ / d of draws ``(B,)``, loss per squared error in x0 space; measured from ``losses``
            if not given.

    Attributes:
        floors: The irreducible losses.

    Raises:
        ValueError: If the loss is no squared error of each sample.
    """

    def __init__(
        self,
        train: FixedDraws,
        held_out: FixedDraws | None,
        population: Population | None,
        losses: Losses,
        batch_size: int,
        device: torch.device,
        scale: Callable[[Noised], Tensor] | None = None,
    ) -> None:
        self.train, self.held_out, self.population = train, held_out, population
        self.batch_size, self.device = batch_size, device
        self._targets: list[Tensor] = []
        self._scale = self._measured_scale(losses, scale)
        self.floors = self._measured_floors(train.gathered(self._train_rows(), 7, device))

    def measure(self, step: int, losses: Losses) -> Record:
        """Return what a validation finds; ``losses`` in evaluation mode and without gradient."""
        direct = [
            losses(made_of(noised, target.to(self.device)))
            for (_, noised), target in zip(self._batches(self.train), self._targets, strict=True)
        ]
        held_out = None
        if self.held_out is not None:
            found = [losses(noised) for _, noised in self._batches(self.held_out)]
            held_out = self._block_losses(self.held_out, found)
        return Record(step, self._block_losses(self.train, direct), held_out)

    @property
    def evaluations(self) -> int:
        """Calls of the network with one sample that a validation costs, over all ranks."""
        sets = [self.train, *([] if self.held_out is None else [self.held_out])]
        return sum(each.levels * each.samples for each in sets)

    def _batches(self, draws: FixedDraws) -> Iterator[tuple[Tensor, Noised]]:
        return draws.batches(self.batch_size, self.device)

    def _block_losses(self, draws: FixedDraws, parts: list[Tensor]) -> Tensor:
        losses = draws.gathered([part[:, None] for part in parts], 1, self.device)
        return block_means(losses[..., 0])

    def _optimum(self, noised: Noised, *, is_held_out: bool = False) -> Optimum:
        if self.population is None:
            return own_optimum(noised)
        return self.population.optimum(noised, is_held_out=is_held_out)

    def _measured_scale(self, losses: Losses, scale: Callable[[Noised], Tensor] | None) -> Tensor:
        """Return λ / d of each draw ``(L, n)``, which depends on its time alone."""
        draws = self.train.one_of_each_time()
        found = [
            _differences(losses, noised) if scale is None else scale(noised)[:, None]
            for _, noised in self._batches(draws)
        ]
        numbers = draws.gathered(found, 3 if scale is None else 1, self.device)
        if scale is None:
            _check_squared(numbers[..., 1:].sum(dim=(0, 1)))
        return numbers[:, time_numbers(self.train.samples), 0]

    def _train_rows(self) -> list[Tensor]:
        """Keep the optima of this rank's draws, and return numbers of each batch ``(rows, 7)``.

        They are the parts of V, what rounding makes, two bounds of V and a control variate of it.
        """
        found, population = [], self.population
        for _, noised in self._batches(self.train):
            optimum = self._optimum(noised)
            self._targets.append(optimum.x0.to("cpu", noised.x0.dtype))
            others = [torch.zeros_like(optimum.low)] * 3
            if population is not None:
                bounds = population.pair_bound(noised), population.linear_bound(noised)
                others = [*bounds, population.control(noised)]
            rows = [*optimum[1:], _rounding(noised), *others]
            found.append(torch.stack([_precise(x) for x in rows], dim=1))
        return found

    def _measured_floors(self, train_rows: Tensor) -> Floors:
        found = self._scale[..., None] * train_rows
        low, middle, high, rounding, pairs, linear, control = found.unbind(dim=2)
        population, times = self.population, self.train.level_times
        unseen = torch.zeros_like(times.noise_levels)
        if population is not None and population.is_whole:
            unseen = _missing_events(low, torch.minimum(pairs.mean(dim=1), linear.mean(dim=1)))
        elif population is not None:
            slopes = [_slope(x, control) for x in (low, middle, high)]
            low, middle, high = (
                x - slope[:, None] * control
                for x, slope in zip((low, middle, high), slopes, strict=True)
            )
            unseen = slopes[2].abs() * self._scale.mean(dim=1) * population.control_error
        others = () if self.held_out is None else self._held_out_floors(self.held_out)
        return Floors(
            times.noise_levels,
            times.edges,
            *(block_means(low), block_means(middle), block_means(high)),
            unseen,
            rounding.mean(dim=1),
            *others,
        )

    def _held_out_floors(self, held_out: FixedDraws) -> tuple[Tensor, Tensor]:
        optima = [self._optimum(noised, is_held_out=True) for _, noised in self._batches(held_out)]
        bounds = [torch.stack([each.low, each.high], dim=1) for each in optima]
        found = self._scale[..., None] * held_out.gathered(bounds, 2, self.device)
        low, high = found.unbind(dim=2)
        return block_means(low), block_means(high)


def _missing_events(low: Tensor, bound: Tensor) -> Tensor:
    """Return what events that no draw met may add to the mean of ``low (L, n)``, ``(L,)``."""
    effective = low.sum(dim=1) ** 2 / low.square().sum(dim=1)
    missing = (bound - low.mean(dim=1)).clamp(min=0)
    return torch.where(effective > _ENOUGH, 0, missing)


def _slope(values: Tensor, control: Tensor) -> Tensor:
    """Return the slopes of ``values (L, n)`` over a control variate, by least squares, ``(L,)``."""
    centred = control - control.mean(dim=1, keepdim=True)
    size = centred.square().sum(dim=1)
    return torch.where(size > 0, (values * centred).sum(dim=1) / size, 0)


def made_of(noised: Noised, x0: Tensor) -> Noised:
    """Return draws at the same x_t that are made of other samples ``x0 (B, *)``."""
    ratio = _precise(noised.alpha) / _precise(noised.sigma)
    shift = _precise(x0) - _precise(noised.x0)
    noise = _precise(noised.noise) - expand(ratio, shift) * shift
    return replace(noised, x0=x0.to(noised.x0), noise=noise.to(noised.noise))


def _differences(losses: Losses, noised: Noised) -> Tensor:
    """Return λ / d of each draw, the third difference of the loss, and its size ``(B, 3)``.

    They are taken along a line of samples that the same x_t is made of.
    """
    shift, squared = _shift(noised)
    values = [_precise(losses(made_of(noised, noised.x0 + k * shift))) for k in (-1, 0, 1, 2)]
    second = values[0] - 2 * values[1] + values[2]
    third = values[3] - 3 * values[2] + 3 * values[1] - values[0]
    size = torch.stack(values).abs().sum(dim=0)
    return torch.stack([(second / (2 * squared)).clamp(min=0), third.abs(), size], dim=1)


def _check_squared(differences: Tensor) -> None:
    """Raise if the third difference of a loss is not 0 beside its size."""
    third, size = differences.tolist()
    if not third <= _CUBIC * size:
        raise ValueError(
            f"`loss` must be a squared error of what the network predicts, the same for the same "
            f"network and input, got one whose third difference is {third / (size or 1):.2g} of "
            f"its size: give the squared error of each sample, without clipping or noise of its "
            f"own."
        )


def _shift(noised: Noised) -> tuple[Tensor, Tensor]:
    """Return a change of x0 beside which neither sample nor noise is small, and its square."""
    source = noised.noise.flip(0) if len(noised.t) > 1 else noised.noise
    alpha, sigma = _precise(noised.alpha), _precise(noised.sigma)
    spread = _precise(noised.x0).square().mean().sqrt().clamp(min=1e-12)
    scale = sigma * spread / torch.hypot(sigma, alpha * spread)
    shift = expand(scale, source) * source
    return shift, shift.flatten(1).square().sum(dim=1)


def _rounding(noised: Noised) -> Tensor:
    """Return ``‖x0_hat - D‖²`` that rounding alone makes ``(B,)``."""
    unit = _ROUNDING * torch.finfo(noised.x0.dtype).eps
    return unit**2 * _precise(noised.x0).flatten(1).square().sum(dim=1)


def _precise(x: Tensor) -> Tensor:
    return x.to(widest_float(x.device))
