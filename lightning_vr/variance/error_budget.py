r"""How much of a sampler's error is initialisation, discretisation and the learned score.

In ``z = x_t / alpha`` and ``s = sigma / alpha`` (``process.solvers.solver``) let mu_s be the law of
the noised data at level s, F_j the exact flow from level s_j to s_(j+1), Phi_j a step of the solver
with the exact denoiser D and Phi'_j the same step with the learned one, D'. A sample y_j of the
sampler is followed beside the exact trajectory x_j ~ mu_(s_j) that it is coupled with. Adding and
subtracting Phi'_j(x_j) and Phi_j(x_j), the error ``e_j = ‖y_j - x_j‖`` satisfies

    e_(j+1) <= gamma_j e_j + delta_j + ell_j                      (‖·‖ is that of L2 over samples)

    gamma_j = ‖Phi'_j(y_j) - Phi'_j(x_j)‖ / e_j     amplification, along the error that there is
    delta_j = ‖Phi_j(x_j) - F_j(x_j)‖               local bias of the step
    ell_j   = ‖Phi'_j(x_j) - Phi_j(x_j)‖            what the learned score adds

Each is measured on the same trajectories, so that the bound holds for them exactly, by the triangle
inequality; ``e`` of the last step is no less than the Wasserstein-2 distance of the two laws. For
Euler's step ``ell_j = a_j beta_j R_j`` with ``a_j = (s_j - s_(j+1)) / s_j``, where ``beta = s tau /
sqrt(s² + tau²)`` and R_j² is the excess loss of EDM's raw network: ``beta_j R_j = ‖D' - D‖`` in
L2(mu_(s_j)). The recursion, with W2 in place of e, and this identification of the learning term
with the excess loss are Brosse and Dalalyan 2026, "Universal Local Error and Realized Amplification
for the First-Order EDM Predictor", which treats Euler's step. Unrolled, each term is carried to the
end by the amplification of the steps that follow it: the three sums are the budget.

Terms that point in different directions cancel in part, most where the local bias changes its sign
along the trajectory, as Heun's does. With u the unit vector of the error after the step,

    e_(j+1) = <u, Phi'_j(y_j) - Phi'_j(x_j)> + <u, Phi_j(x_j) - F_j(x_j)>
              + <u, Phi'_j(x_j) - Phi_j(x_j)>.

With negative terms counted as 0 the same recursion is the directional bound: above the
error, and below the bound of the norms, as no projection is longer than its vector.

All lengths are in the units of the data, root mean squares over samples and dimensions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_vr.process.reverse_estimate import ReverseEstimate
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.solvers.row_noise import NoiseKey, RowNoise
from lightning_vr.process.solvers.solver import Denoiser, Problem, StepSolver
from lightning_vr.variance.exact_path import exact_path


@dataclass(frozen=True)
class ErrorBudget:
    """The terms of each of K steps, and what they come to at the end.

    Attributes:
        noise_levels: Level at which each step begins ``(K,)``; the last step leads to 0.
        amplification: gamma of each step ``(K,)``; 1 where there is no error yet.
        local_bias: delta of each step ``(K,)``.
        score: What the learned score adds in each step, ell ``(K,)``.
        distance: ``‖D' - D‖`` at the level where the step begins ``(K,)``.
        error: ``e``, before the first step and after each ``(K + 1,)``.
        directional_bound: Bound on the error at the end by the terms along it.
        sigma_data: Standard deviation tau of the data in EDM's coordinates.
    """

    noise_levels: Tensor
    amplification: Tensor
    local_bias: Tensor
    score: Tensor
    distance: Tensor
    error: Tensor
    directional_bound: float
    sigma_data: float

    @property
    def next_levels(self) -> Tensor:
        """Level at which each step ends ``(K,)``, 0 in the last."""
        return torch.cat([self.noise_levels[1:], self.noise_levels.new_zeros(1)])

    @property
    def step_fraction(self) -> Tensor:
        """``a``, the fraction of the noise level that each step goes ``(K,)``."""
        return 1 - self.next_levels / self.noise_levels

    @property
    def excess_loss(self) -> Tensor:
        """``R²`` per dimension: excess loss of EDM's raw network at each level ``(K,)``."""
        s, tau = self.noise_levels, self.sigma_data
        return self.distance**2 * (s**-2 + tau**-2)

    @property
    def carried(self) -> Tensor:
        """Product of the amplification of all steps after each ``(K,)``; 1 for the last."""
        later = torch.cat([self.amplification[1:], self.amplification.new_ones(1)])
        return later.flip(0).cumprod(0).flip(0)

    @property
    def initialisation(self) -> float:
        """What the start adds to the error at the end."""
        return float(self.error[0] * self.amplification[0] * self.carried[0])

    @property
    def discretisation(self) -> float:
        """What the length of the steps adds to the error at the end."""
        return float((self.carried * self.local_bias).sum())

    @property
    def learned_score(self) -> float:
        """What the learned score adds to the error at the end."""
        return float((self.carried * self.score).sum())

    @property
    def bound(self) -> float:
        """The sum of the three: what the error at the end is at most."""
        return self.initialisation + self.discretisation + self.learned_score

    def score_levels(self, share: float = 0.8) -> tuple[float, float]:
        """Return the lowest and highest level of the steps that add most of the score's part.

        Args:
            share: The part of it that lies between them; the rest is cut off evenly at both ends.
        """
        cumulated = (self.carried * self.score).cumsum(0)
        cut = (1 - share) / 2 * cumulated[-1]
        first = min(int((cumulated <= cut).sum()), len(cumulated) - 1)
        last = int((cumulated < cumulated[-1] - cut).sum())
        return float(self.noise_levels[last]), float(self.noise_levels[first])


@torch.no_grad()
def measure_error_budgets(
    solver: StepSolver,
    learned: Denoiser,
    exact: Denoiser,
    schedule: Schedule,
    grids: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    sigma_data: float,
    dtype: torch.dtype = torch.float64,
) -> dict[str, ErrorBudget]:
    """Measure the budget of a sampler on several grids, on the same exact trajectories.

    Args:
        solver: A solver whose step is a deterministic map, such as ``Euler()``.
        learned: The learned denoiser.
        exact: The exact one, in float64.
        schedule: The schedule of both; all else is in z and s.
        grids: Decreasing noise levels by name, all with the same largest one.
        x: Exact samples at the largest level, in z ``(n, *)``, float64.
        y: Where the sampler begins instead, coupled with them; ``x`` itself for an exact start.
        sigma_data: Standard deviation tau of the data in EDM's coordinates.
        dtype: What the learned denoiser takes.

    Raises:
        ValueError: If the grids begin at different levels.
    """
    tops = {name: float(levels[0]) for name, levels in grids.items()}
    high = max(tops.values())
    if not all(math.isclose(top, high, rel_tol=1e-6) for top in tops.values()):
        raise ValueError(
            f"`grids` must begin at the same noise level, where the samples are, got {tops}: begin "
            f"all of them at the largest."
        )
    problems = _problem(learned, schedule, dtype), _problem(exact, schedule, torch.float64)
    states = exact_path(
        problems[1], x, [level for grid in grids.values() for level in grid.tolist()]
    )
    return {
        name: _follow(solver, *problems, grid.double(), states, y, sigma_data)
        for name, grid in grids.items()
    }


def _follow(
    solver: StepSolver,
    learned: Problem,
    exact: Problem,
    grid: Tensor,
    states: Mapping[float, Tensor],
    y: Tensor,
    sigma_data: float,
) -> ErrorBudget:
    """Follow the sampler beside the exact trajectories over one grid."""
    levels = [*grid.tolist(), 0.0]
    rows, errors = [], [_size(y - states[levels[0]])]
    directional = errors[0]
    for level, next_level in pairwise(levels):
        x, after = states[level], states[next_level]
        from_x, from_y = (solver.step(learned, z, level, next_level) for z in (x, y))
        without = solver.step(exact, x, level, next_level)

        parts = (from_y - from_x, without - after, from_x - without)
        apart = learned.x0_hat(x, level) - exact.x0_hat(x, level)
        before, error = errors[-1], from_y - after
        grown, *sizes = (_size(part) for part in (*parts, apart))
        rows.append((grown / before if before > 0 else 1.0, *sizes))
        grown, *added = (max(0.0, _along(part, error)) for part in parts)
        directional = (grown / before if before > 0 else 1.0) * directional + sum(added)
        errors.append(_size(error))
        y = from_y
    amplification, bias, score, distance = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
    size = torch.tensor(errors, dtype=torch.float64)
    return ErrorBudget(
        grid.cpu(), amplification, bias, score, distance, size, directional, sigma_data
    )


def _problem(denoiser: Denoiser, schedule: Schedule, dtype: torch.dtype) -> Problem:
    """Return what a deterministic step needs: it draws no noise."""

    def estimate(xt: Tensor, t: Tensor) -> ReverseEstimate:
        return ReverseEstimate(denoiser(xt, t), None)

    return Problem(denoiser, schedule, 0, (), RowNoise(NoiseKey(None), 0, 0), dtype, estimate)


def _along(x: Tensor, direction: Tensor) -> float:
    """Return the length of x along a direction, 0 if that has none."""
    length = _size(direction)
    return float((x * direction).mean()) / length if length > 0 else 0.0


def _size(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
