r"""Likelihood of data under a diffusion model, in bits per dimension.

The probability-flow ODE carries data to noise, and the density along with it (Song et al. 2021,
arXiv 2011.13456, section 4.3 and appendix D.2). In ``z = x_t / alpha`` and ``s = sigma / alpha`` it
is ``dz/ds = (z - D(z, s)) / s`` for every schedule and prediction, D being x0_hat. The state is
kept at unit scale, ``y = z / n`` with ``n = sqrt(1 + s²)``, and time is ``u = log s``:

    dy/du = (z / n² - D) / n        d log p(y) / du = -(d / n² - tr dD/dz)

in which nothing cancels at either end. The trace is exact in up to 16 dimensions; above it is
Hutchinson's unbiased ``v' (dD/dz) v`` with v of random signs, which each sample keeps along its
path. The solver is the adaptive Runge-Kutta method of order 5(4) of Dormand and Prince.

**At the largest noise level** the density is N(0, s²) in z, that from which samplers start.

**Below the smallest noise level** ``s_min`` the network was not trained. There the score is taken
to be that at ``s_min``. In ``s²`` the ODE's right-hand side stays finite, ``dz/d(s²) = (z - D) /
(2 s²)``, and one step of it leads from the data to ``s_min``:

    z = x0 + (x0 - D(x0, s_min)) / 2        log p_0(x0) = log p(z) + (d - tr dD/dx0) / 2

with an error of order ``s_min⁴`` where the density is smooth at the scale of ``s_min``; to leave
the step out, as is usual, has one of ``s_min²``. Data on a surface or of single points has no
density, and its value falls without end as ``s_min`` does.

**Pixels** of ``levels`` values in [-1, 1] are ``Δ = 2 / (levels - 1)`` apart. With noise u, uniform
over ``[-Δ/2, Δ/2]``, Jensen's inequality gives ``log P(x) >= E log p(x + u) + d log Δ`` (Theis et
al. 2016, arXiv 1511.01844, section 3.1): the bits per dimension are those of the density plus
``log2((levels - 1) / 2)``, 6.994 for 256 levels, and an upper bound. A network that was trained
without such noise knows the gaps between the levels, where the bound is poor.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_vr.core.validation import check_integer, check_positive, check_samples
from lightning_vr.process.guidance import ConditionalDenoiser
from lightning_vr.process.pixel_levels import check_levels, check_on_levels
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.solvers.dormand_prince import dormand_prince
from lightning_vr.process.solvers.solver import Denoiser

_EXACT = 16
"""Largest dimension in which the trace is exact by default: each costs a backward pass."""


@dataclass(frozen=True)
class Likelihood:
    """How the likelihood of data is computed.

    Attributes:
        probes: Vectors of random signs for each sample, or ``"exact"`` for the exact trace, which
            takes as many backward passes as there are dimensions; ``"auto"`` is exact in up to 16
            dimensions, and one vector above.
        tolerance: Relative and absolute error that the solver allows in each step. Rounding of a
            network in float32 is above 1e-5, where the solver would take very many steps.
        levels: Number of values that a pixel has in [-1, 1], 256 for 8 bits. By default the data
            is continuous, and its bits per dimension depend on its units and may be negative.
    """

    probes: int | Literal["exact", "auto"] = "auto"
    tolerance: float = 1e-3
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.probes not in ("exact", "auto"):
            check_integer("probes", self.probes, 1)
        check_positive("tolerance", self.tolerance)
        check_levels(self.levels)

    def bits_per_dimension(
        self,
        denoise: ConditionalDenoiser,
        schedule: Schedule,
        x0: Tensor,
        source: torch.Generator,
        *,
        group: Tensor | None = None,
        cond: dict[str, Any] | None = None,
    ) -> Tensor:
        """Return the negative log-likelihood of each sample in bits per dimension, ``(B,)``.

        Args:
            denoise: Estimates x0 from x_t, t, class labels and condition, differentiably.
            schedule: The schedule that it was trained with.
            x0: Clean samples ``(B, *)``.
            source: Generator of the noise on pixels and of the probes, on the samples' device.
            group: Class labels ``(B,)``, or None.
            cond: Further condition, one row per sample in each value.

        Raises:
            ValueError: If ``levels`` are given and the samples are no such pixels.
        """
        check_samples("x0", x0)
        dimension = x0[0].numel()
        with torch.inference_mode(False), torch.no_grad():
            x0 = x0.clone()  # one of inference mode takes no part in differentiation
            offset = 0.0
            if self.levels is not None:
                x0 = _dequantised(x0, self.levels, source)
                offset = math.log2((self.levels - 1) / 2)
            flow = _Flow(
                lambda xt, t: denoise(xt, t, group, cond), schedule, self._probes(x0, source)
            )
            return offset - flow.log_density(x0, self.tolerance) / (dimension * math.log(2))

    def _probes(self, x0: Tensor, source: torch.Generator) -> Tensor:
        """Return vectors ``(K, B, *)`` whose mean of v v' is the identity or has it as its mean."""
        dimension = x0[0].numel()
        if self.probes == "exact" or (self.probes == "auto" and dimension <= _EXACT):
            basis = torch.eye(dimension, dtype=x0.dtype, device=x0.device) * math.sqrt(dimension)
            return basis.reshape(-1, 1, *x0.shape[1:]).expand(-1, *x0.shape)
        size = (1 if self.probes == "auto" else int(self.probes), *x0.shape)
        signs = torch.randint(2, size, generator=source, device=x0.device)
        return (2 * signs - 1).to(x0.dtype)


class _Flow:
    """The probability flow and its divergence."""

    def __init__(self, denoiser: Denoiser, schedule: Schedule, probes: Tensor) -> None:
        self.denoiser, self.schedule, self.probes = denoiser, schedule, probes
        self.wide = torch.float32 if probes.device.type == "mps" else torch.float64
        self.levels = Sampler(steps=2).noise_levels(schedule).to(probes.device, self.wide)

    def log_density(self, x0: Tensor, tolerance: float) -> Tensor:
        high, low = self.levels
        dimension = x0[0].numel()
        z = x0.to(self.wide)
        x0_hat, trace = self.denoise(z, low)
        z, below = z + (z - x0_hat) / 2, (dimension - trace) / 2

        start = (z / (1 + low**2).sqrt(), torch.zeros_like(trace))
        times = torch.stack([low, high]).log()
        found = dormand_prince(self.rates, start, times, tolerance, tolerance)
        y, change = (part[-1] for part in found)

        # y is normal with variance s² / (1 + s²) at the end, and z = n y at the start
        variance = high**2 / (1 + high**2)
        squares = y.flatten(1).square().sum(1)
        last = -squares / (2 * variance) - dimension / 2 * torch.log(2 * math.pi * variance)
        scale: Tensor = dimension / 2 * torch.log1p(low**2)
        density: Tensor = last + change - scale + below
        return density

    def rates(self, u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, s = state[0], u.exp()
        square = 1 + s**2
        z = y * square.sqrt()
        x0_hat, trace = self.denoise(z, s)
        return (z / square - x0_hat) / square.sqrt(), y[0].numel() / square - trace

    def denoise(self, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0_hat ``(B, *)`` and the trace of its derivative by z ``(B,)``."""
        t = self.schedule.time(s)
        dtype, alpha = self.probes.dtype, self.schedule.alpha(t)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x0_hat = self.denoiser((alpha * z).to(dtype), t.to(dtype).expand(len(z))).to(self.wide)
            products = [
                (torch.autograd.grad(x0_hat, z, v.to(self.wide), retain_graph=True)[0] * v)
                for v in self.probes
            ]
        traces = torch.stack([product.flatten(1).sum(1) for product in products])
        return x0_hat.detach(), traces.mean(0)


def _dequantised(x0: Tensor, levels: int, source: torch.Generator) -> Tensor:
    check_on_levels(x0, levels)
    step = 2 / (levels - 1)
    noise = torch.rand(x0.shape, generator=source, device=x0.device, dtype=x0.dtype)
    return x0 + step * (noise - 0.5)
