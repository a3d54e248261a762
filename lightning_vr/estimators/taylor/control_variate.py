"""Taylor control variates: the part of the gradient noise that a Taylor polynomial explains.

The noise ε of a draw enters the loss through the network's input and through its target. For small
noise the network is nearly its Taylor polynomial around the clean sample; the loss of the
polynomial is known together with its mean over ε (``terms.py``), and their difference, a term
whose gradient has mean zero, is subtracted (Jeha, Grathwohl, Andersen, Ek and Frellsen 2024,
arXiv 2408.12270):

    loss - β_odd (odd part) - β_even (even part)

The coefficients are those of least variance of the gradient, not of the loss, in bins of the noise
level and from gradients of earlier steps (``coefficients.py``). Order 0, with β = 1 below a fixed
noise level, is also known from Song and Kingma 2021, arXiv 2101.03288.

It explains only the noise of ε, not that of sample and timestep, and only where the network is
smooth on the scale of the noise: low dimension, low noise, early training. Where it saves less than
its passes cost, the gate closes.
"""

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.rows import concatenated, rows_at, tensors
from lightning_vr.core.types import Noised, TargetEstimate
from lightning_vr.core.validation import check_at_least, check_choice, check_finite_number
from lightning_vr.estimators.loss import ControlVariate, Network, network_output
from lightning_vr.estimators.slot import warn_of_dropped_state
from lightning_vr.estimators.taylor.coefficients import ControlFit, DeviceCopy
from lightning_vr.estimators.taylor.terms import (
    clean_points,
    constant_term,
    first_term,
    taylor_terms,
)
from lightning_vr.process.objective import Objective

Expectation = Literal["exact", "rademacher"]

LARGEST_DIMENSION = 16
"""Largest number of values in a sample for exact traces: order 2 needs d (d + 1) / 2 rows."""


class TaylorCV(ControlVariate):
    """Subtracts the loss of a Taylor polynomial of the network, minus its mean, from the loss.

    Args:
        order: Order of the polynomial. 0: one more pass at the clean sample, for any network. 1:
            also forward-mode derivatives. 2: also second derivatives, for samples of at most 16
            numbers.
        expectation: How order 1 takes the mean of its even part: ``"exact"``, for samples of at
            most 16 numbers, or ``"rademacher"``, along random directions of signs.
        probes: Number of random directions for each draw.
        bins: Bins of the noise level, equally likely under the loss's density of t, with
            coefficients of their own.
        gate: ``"auto"`` runs it in the bins where its measured saving exceeds its cost, ``"open"``
            for all draws, two numbers at noise levels sigma/alpha between them.
        control: Whose variance the coefficient minimises. ``"gradient"``, or, only for comparison,
            ``"objective"``: the value of the loss, whose coefficient differs and can make the
            gradient noisier.
        coefficient: β of both parts in all bins, instead of fitted ones.
        refit_every_n_steps: Optimizer steps from one fit to the next; if not given, fits take 2 %
            of the training time, and 5 % while bins are open.

    Attributes:
        fit: What has been learned: coefficients and open bins.
        pilot: Number, time and next step of the fits, or None before the first.
    """

    def __init__(
        self,
        order: int = 0,
        expectation: Expectation = "exact",
        probes: int = 1,
        bins: int = 8,
        gate: Literal["auto", "open"] | tuple[float, float] = "auto",
        control: Literal["gradient", "objective"] = "gradient",
        coefficient: float | None = None,
        refit_every_n_steps: int | None = None,
    ) -> None:
        super().__init__()
        _check_order(order, expectation, probes)
        _check_choices(bins, gate, control, refit_every_n_steps)
        if coefficient is not None:
            check_finite_number("coefficient", coefficient)
        self.order = order
        self.expectation: Expectation = expectation
        self.probes = probes
        self.bins = bins
        self.gate = gate
        self.control = control
        self.coefficient = coefficient
        self.refit_every_n_steps = refit_every_n_steps
        self.fit = ControlFit(bins, on_values=control == "objective", coefficient=coefficient)
        self.pilot: dict[str, float] | None = None
        self._coefficients, self._is_open = DeviceCopy(), DeviceCopy()

    @property
    def parts(self) -> int:
        """Number of terms with coefficients of their own: odd and, from order 1, even."""
        return 1 if self.order == 0 else 2

    @property
    def is_closed(self) -> bool:
        """Whether the gate is closed for all draws."""
        return self.gate == "auto" and not bool(self.fit.is_open.any())

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to learn."""
        return self.gate != "auto" and self.coefficient is not None

    def draw(self, noised: Noised, generator: torch.Generator) -> Noised:
        shape = tuple(noised.x0.shape[1:])
        if self.order > 0 and self.expectation == "exact":
            _check_dimension(self.order, shape)
        if self.expectation == "exact":
            return noised
        size = (len(noised.t), self.probes, *shape)
        options: Any = {"generator": generator, "device": noised.x0.device}
        signs = 2 * torch.randint(2, size, **options) - 1
        return replace(noised, probes=signs.to(noised.x0.dtype))

    def forward(
        self, network: Network, noised: Noised, target: TargetEstimate, objective: Objective
    ) -> tuple[Tensor, Tensor]:
        rows = self._open_rows(noised, objective)
        if rows is not None and not len(rows):
            return network_output(network, noised, objective), torch.zeros_like(noised.t)
        some = noised if rows is None else _rows(noised, rows)
        if self.order == 0:
            output, terms = self._in_one_batch(network, noised, some, objective)
        else:
            output = network_output(network, noised, objective)
            terms = None
        control = self._weighted(network, some, objective, terms)
        if rows is not None:
            control = control.new_zeros(len(noised.t)).index_add(0, rows, control)
        return output, control

    def terms(self, network: Network, noised: Noised, objective: Objective) -> Tensor:
        """Return the parts of the term of each draw, before coefficients, ``(B, parts)``."""
        return taylor_terms(network, noised, objective, self.order)

    def bin(self, t: Tensor, objective: Objective) -> Tensor:
        """Return the bins ``(B,)`` that times fall into."""
        v = objective.timesteps.cdf(t.to(widest_float(t.device)))
        return (v * self.bins).long().clamp(0, self.bins - 1)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what has been learned, for the checkpoint."""
        return {"settings": self._settings, "fit": self.fit.state(), "pilot": self.pilot}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load what was learned with the same settings, or warn if they differ."""
        own, saved = self._settings, state["settings"]
        differing = [
            f"`{name}` is {value!r}, the checkpoint's is {saved[name]!r}"
            for name, value in own.items()
            if saved[name] != value
        ]
        if differing:
            warn_of_dropped_state(
                f"TaylorCV: {', '.join(differing)}: its coefficients and gate are dropped, and "
                f"learning starts anew."
            )
            return
        self.fit.load(state["fit"])
        self.pilot = state["pilot"]

    @property
    def _settings(self) -> dict[str, Any]:
        names = ("order", "expectation", "bins", "control")
        return {name: getattr(self, name) for name in names}

    def _open_rows(self, noised: Noised, objective: Objective) -> Tensor | None:
        """Return the indices of the draws that it runs for, or None for all."""
        if self.gate == "open" or (self.gate == "auto" and bool(self.fit.is_open.all())):
            return None
        if self.is_closed:
            return torch.zeros(0, dtype=torch.int64, device=noised.t.device)
        if self.gate == "auto":
            table = self._is_open.of(self.fit.is_open, noised.t.device, torch.bool)
            is_open = table[self.bin(noised.t, objective)]
        else:
            low, high = self.gate
            is_open = (noised.noise_level >= low) & (noised.noise_level <= high)
        # the host must wait for their number, or the pass could not leave rows out
        return is_open.nonzero()[:, 0]

    def _in_one_batch(
        self, network: Network, noised: Noised, some: Noised, objective: Objective
    ) -> tuple[Tensor, Tensor]:
        """Return the output at all draws and the order-0 term of some, from one pass."""
        both = concatenated([tensors(noised), tensors(clean_points(some))])
        output = network_output(network, Noised(**both), objective)
        count = len(noised.t)
        return output[:count], first_term(output[count:], some, objective)

    def _weighted(
        self, network: Network, noised: Noised, objective: Objective, terms: Tensor | None
    ) -> Tensor:
        """Return the sum of the terms of each draw, times their coefficients, ``(B,)``."""
        bins = self.bin(noised.t, objective)
        beta = self._coefficients.of(self.fit.coefficients, noised.t.device, noised.t.dtype)
        if terms is None:
            terms = self.terms(network, noised, objective)
        control = -(beta[bins] * terms).sum(dim=1)
        if self.control == "objective":
            control = control - beta[bins, 0] * constant_term(noised, objective)
        return control


def _rows(noised: Noised, rows: Tensor) -> Noised:
    return Noised(**rows_at(tensors(noised), rows))


def _check_order(order: int, expectation: str, probes: int) -> None:
    check_choice("order", order, (0, 1, 2))
    check_choice("expectation", expectation, get_args(Expectation))
    if expectation != "exact" and order != 1:
        reason = "the mean of order 0 is exact" if order == 0 else "order 2 takes exact traces"
        raise ValueError(
            f"`expectation` must be 'exact' with order {order}, got {expectation!r}: leave it out, "
            f"or use order 1, as {reason}."
        )
    check_at_least("probes", probes, 1)
    if probes > 1 and expectation == "exact":
        raise ValueError(
            f"`probes` must be 1 with expectation='exact', got {probes}: leave it out, or use "
            f"expectation='rademacher'."
        )


def _check_choices(
    bins: int,
    gate: str | tuple[float, float],
    control: str,
    refit_every_n_steps: int | None,
) -> None:
    check_at_least("bins", bins, 1)
    if refit_every_n_steps is not None:
        check_at_least("refit_every_n_steps", refit_every_n_steps, 1)
    check_choice("control", control, ("gradient", "objective"))
    is_window = not isinstance(gate, str) and len(gate) == 2 and 0 <= gate[0] < gate[1]
    if gate not in ("auto", "open") and not is_window:
        raise ValueError(
            f"`gate` must be 'auto', 'open' or two noise levels (low, high) with 0 <= low < high, "
            f"got {gate!r}: use 'auto' if in doubt."
        )


def _check_dimension(order: int, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    if size > LARGEST_DIMENSION:
        instead = "use expectation='rademacher', or order 0" if order == 1 else "use order 1 or 0"
        raise ValueError(
            f"Samples must have at most {LARGEST_DIMENSION} numbers for expectation='exact' with "
            f"order {order}, got {size}: {instead}."
        )
