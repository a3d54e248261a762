"""The error budget of a module's sampler: train more, take more steps, or space them otherwise?

``variance.error_budget`` holds the theory. The exact denoiser is the posterior mean under the
training set, and the sampler's law is compared with that set itself: at low noise, a network that
generalises differs from it, and the part of the learned score counts this as error too.

The budget is measured on the sampler's own noise levels and on alternatives with the same ends: the
other ways of spacing them, and twice as many. All of them see the same exact trajectories.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lightning_vr.auditing.before_training import measure_before_training
from lightning_vr.core.devices import widest_float
from lightning_vr.core.types import Clean
from lightning_vr.core.validation import check_integer
from lightning_vr.lifecycle.training_set import check_equal_chances
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.process.grids import GridKind, spaced
from lightning_vr.process.sampling import Sampler, evaluating
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.solvers import Euler, Heun, Solver
from lightning_vr.process.solvers.solver import StepSolver
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.reference_bank import read_references
from lightning_vr.variance.empirical_distribution import EmpiricalDistribution, noise_at_levels
from lightning_vr.variance.error_budget import ErrorBudget, measure_error_budgets
from lightning_vr.variance.gaussian_start import gaussian_start

OWN = "own"
"""Name of the sampler's own grid."""

TWICE = "twice the steps"

_WORTH = 0.9
"""Fraction of the bound below which another grid is worth the change."""

_BATCH = 256
"""Samples that the network is called on at a time."""


@dataclass(frozen=True)
class SamplingErrors:
    """Budgets of a sampler on its own grid and on alternatives, and what follows.

    Attributes:
        solver: Name of the solver.
        budgets: By name of the grid, ``"own"`` first.
        samples: Number of trajectories.
        total_weight: W of the module's objective at the own grid's noise levels ``(K,)``.
    """

    solver: str
    budgets: dict[str, ErrorBudget]
    samples: int
    total_weight: Tensor

    @property
    def own(self) -> ErrorBudget:
        """The budget on the sampler's own grid."""
        return self.budgets[OWN]

    @property
    def advice(self) -> str:
        """What would lower the error most, in one sentence."""
        return advise(self.budgets)


def advise(budgets: dict[str, ErrorBudget]) -> str:
    """Return what lowers the error most, by the largest part of the own grid's budget.

    Args:
        budgets: By name of the grid, ``"own"`` first; ``"twice the steps"`` costs twice as much,
            all others as much as the own one.
    """
    own = budgets[OWN]
    parts = {
        "the learned score": own.learned_score,
        "discretisation": own.discretisation,
        "initialisation": own.initialisation,
    }
    largest = max(parts, key=lambda name: parts[name])
    reason = f"{largest} makes {parts[largest] / own.bound:.0%} of the bound on the sampling error"
    rivals = {name: x.bound for name, x in budgets.items() if name not in (OWN, TWICE)}
    best = min(rivals, key=lambda name: rivals[name], default=None)
    change = {name: x.bound / own.bound - 1 for name, x in budgets.items()}
    by_steps = f"twice the steps would change the bound by {change[TWICE]:+.0%}"
    by_grid = "" if best is None else f", {best} noise levels by {change[best]:+.0%}"
    if largest == "the learned score":
        low, high = own.score_levels()
        span = f"mostly at noise levels from {low:.2g} to {high:.2g}"
        if low == high:
            span = f"mostly at a noise level of {low:.2g}"
        return f"Train more, {span}: {reason}; {by_steps}{by_grid}."
    if largest == "initialisation":
        top = float(own.noise_levels[0])
        return f"Begin above a noise level of {top:.3g}: {reason}; {by_steps}{by_grid}."
    if best is not None and rivals[best] < _WORTH * own.bound:
        return f"Take another grid, {best}: {reason}; {by_steps}{by_grid} at the same cost."
    return f"Take more steps: {reason}; {by_steps}{by_grid}."


def error_budget(
    module: DiffusionModule,
    datamodule: LightningDataModule,
    sampler: Sampler | None = None,
    *,
    samples: int = 256,
    trainer: Trainer | None = None,
) -> SamplingErrors:
    """Measure what a module's sampler gets wrong, and why, at the module's present weights.

    Neither the module nor the global random state is changed. Class-conditional modules are
    measured as they sample, on the training set's classes. Memory and time are those of a few
    hundred calls of the posterior mean under the whole training set.

    Args:
        module: The module.
        datamodule: Its training data.
        sampler: What to measure, with ``Euler()`` or ``Heun()``; the module's own if not given.
        samples: Number of trajectories that errors are means over.
        trainer: Gives device and precision; by default a new one on this machine. Its callbacks are
            not run, and it cannot be used again.

    Raises:
        MisconfigurationException: If the module is not a DiffusionModule.
        ValueError: If the solver is random or of several steps, if the sampler has guidance, or if
            samples have a condition beyond class labels.
    """
    if not isinstance(module, DiffusionModule):
        raise MisconfigurationException(
            f"`module` must be a DiffusionModule, whose exact denoiser is known, got a "
            f"{type(module).__name__}: give `measure_error_budgets` of lightning_vr.variance its "
            f"denoiser and the exact one."
        )
    check_integer("samples", samples, 2)
    sampler = module.sampler if sampler is None else sampler
    solver = _checked_solver(sampler)

    def measure(trainer: Trainer, module: DiffusionModule) -> SamplingErrors:
        data = _training_set(trainer, module)
        grids = alternatives(sampler, module.schedule)
        with evaluating(module), trainer.precision_plugin.forward_context():
            budgets = _measure(module, data, solver, grids, samples)
        levels = grids[OWN].to(module.device, widest_float(module.device))
        total = module.objective.total_weight(levels).cpu()
        return SamplingErrors(type(solver).__name__, budgets, samples, total)

    return measure_before_training(measure, module, datamodule, trainer)


def alternatives(sampler: Sampler, schedule: Schedule) -> dict[str, Tensor]:
    """Return the sampler's noise levels and others with the same ends, by name."""
    own = sampler.noise_levels(schedule)
    low, high, steps = float(own[-1]), float(own[0]), len(own)

    def grid(kind: GridKind, steps: int, rho: float) -> Tensor:
        return spaced(kind, steps, rho, low, high, schedule)

    found = {"exponential": grid("exponential", steps, 1.0)}
    for rho in (3.0, 7.0):
        found[f"polynomial (rho {rho:g})"] = grid("polynomial", steps, rho)
    found = {name: x for name, x in found.items() if not torch.allclose(x, own, rtol=1e-3)}
    if isinstance(sampler.grid, str):
        found[TWICE] = grid(sampler.grid, 2 * steps, sampler.rho)
    else:
        between = torch.stack([own[:-1], (own[:-1] * own[1:]).sqrt()], dim=1).flatten()
        found[TWICE] = torch.cat([between, own[-1:]])
    return {OWN: own, **found}


def _checked_solver(sampler: Sampler) -> StepSolver:
    solver: Solver = Heun() if sampler.solver is None else sampler.solver
    if not isinstance(solver, (Euler, Heun)):
        raise ValueError(
            f"`solver` must be Euler() or Heun(), whose steps are maps without noise or memory, "
            f"got {solver!r}: give a sampler with one of them."
        )
    if sampler.guidance != 1:
        raise ValueError(
            f"`guidance` must be 1, as guided samples do not follow the law of the data, got "
            f"{sampler.guidance:g}: measure without it."
        )
    return solver


@torch.no_grad()
def _training_set(trainer: Trainer, module: DiffusionModule) -> Clean:
    check_equal_chances(trainer)
    data = read_references(module, trainer)
    if data is None or data.cond_group is not None:
        raise ValueError(
            "The training set must have no condition beyond class labels for an error budget, as "
            "its exact denoiser is not known: measure an unconditional module."
        )
    return data if module.num_classes is not None else replace(data, group=None)


def _measure(
    module: DiffusionModule,
    clean: Clean,
    solver: StepSolver,
    grids: dict[str, Tensor],
    samples: int,
) -> dict[str, ErrorBudget]:
    data = EmpiricalDistribution.prepare(clean.x0, clean.group)
    drawn = data.draw(samples, 0.0, "error budget")
    high = torch.stack([grid[0] for grid in grids.values()]).max().to(data.device)
    x = noise_at_levels(drawn, high[None], "error budget").xt
    every = data.bank.rows + data.bank.centre
    y = gaussian_start(x, float(high), every, drawn.group, data.group)

    def exact(xt: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = module.schedule.alpha(t), module.schedule.sigma(t)
        return posterior_mean(xt, alpha, sigma, data.bank, query_group=drawn.labels).mean

    learned = _Learned(module, tuple(clean.x0.shape[1:]), drawn.group)
    tau, schedule = module.sigma_data, module.schedule
    dtype = torch.float32
    return measure_error_budgets(solver, learned, exact, schedule, grids, x, y, tau, dtype)


class _Learned:
    """A module's denoiser on flat samples of known classes, a batch at a time."""

    def __init__(
        self, module: DiffusionModule, shape: tuple[int, ...], group: Tensor | None
    ) -> None:
        self.module, self.shape, self.group = module, shape, group

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        found: list[Any] = []
        for start in range(0, len(xt), _BATCH):
            rows = slice(start, start + _BATCH)
            device = self.module.device
            group = None if self.group is None else self.group[rows].to(device)
            shaped = xt[rows].reshape(-1, *self.shape).to(device)
            found.append(self.module.denoise(shaped, t[rows].to(device), group).flatten(1))
        return torch.cat(found).to(xt.device)
