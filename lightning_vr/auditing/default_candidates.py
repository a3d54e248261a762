"""The default candidates of an audit: the estimators of this package."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_vr.auditing.candidates import Candidate, settings
from lightning_vr.auditing.draws_candidates import draws_candidates
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import IID, Draws
from lightning_vr.estimators.proposals import LearnedProposal, WeightProposal
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM, Target
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.module import DiffusionModule

_REFERENCES = (256, 1024, 4096)

_LARGEST_BANK = 100_000

_SIMPLE, _LONGEST = ("DSM", "IID", "no control variate"), "4 resamples"

_FEW = 3

_LEAST_SPREAD = 0.01
"""Relative spread of the loss weight below which its proposal is the base density."""


def candidates_for(module: EstimatorModule, loader: Any) -> list[Candidate]:
    """Return the default candidates of a module, and of the data in a training loader.

    Args:
        module: The module to audit.
        loader: Its training loader, whose data set has a length where the module has targets.
    """
    if isinstance(module, DiffusionModule):
        return default_candidates(module, len(loader.dataset))
    return draws_candidates(module)


def few_candidates_for(module: EstimatorModule, loader: Any) -> list[Candidate]:
    """Return the most promising of the default candidates of a module, to measure often.

    Args:
        module: The module that trains.
        loader: As ``candidates_for`` takes it.
    """
    if isinstance(module, DiffusionModule):
        return few_candidates(module, len(loader.dataset))
    return draws_candidates(module)[:_FEW]


def default_candidates(module: DiffusionModule, size: int) -> list[Candidate]:
    """Return the estimators of this package, except the module's own, the most promising first.

    Those are what is simpler than the module's own, and one for each part of the noise
    (``few_candidates``). Then come other targets, draws and control variates, and four resamples,
    whose step is the longest. Each fills one slot; the audit combines the best of different slots.
    Resamples are measured whatever ``encode`` costs, so that the audit can say that they do not
    pay. The control variate of order 0 is measured for all draws, and where its gate opens.

    A bank of a large training set takes long to encode: list your own candidates to have one.

    Args:
        module: The module to audit.
        size: Number of samples in its training set.
    """
    targets, draws = _targets(size), _draws(module)
    own_target, own_draws = settings(module.target), settings(module.draws)
    found = [Candidate(n, target=x) for n, x in targets.items() if settings(x) != own_target]
    found += [Candidate(n, draws=x) for n, x in draws.items() if settings(x) != own_draws]
    found += _control_variates(module)
    few = {c.name for c in few_candidates(module, size)}
    first = [c for c in found if c.name in _SIMPLE] + [c for c in found if c.name in few]
    rest = [c for c in found if c not in first and c.name != _LONGEST]
    return first + rest + [c for c in found if c.name == _LONGEST]


def _targets(size: int) -> dict[str, Target]:
    found: dict[str, Target] = {"DSM": DSM(), 'STF("batch")': STF("batch")}
    if size <= _LARGEST_BANK:
        found |= {f"STF({n})": STF(n) for n in _REFERENCES if n < size}
        found['STF("all")'] = STF("all")
    else:
        rank_zero_info(
            f"The audit leaves out targets with a bank of all {size} training samples: name them "
            f"in `candidates`."
        )
    return found


def _control_variates(module: DiffusionModule) -> list[Candidate]:
    """Return the one of order 0, which any network can have, for all draws and where it pays."""
    found = [
        Candidate("Taylor 0, all draws", control_variate=TaylorCV(gate="open")),
        Candidate("Taylor 0", control_variate=TaylorCV()),
    ]
    own = module.control_variate
    if own is None:
        return found
    others = [c for c in found if c.config()["control_variate"] != settings(own)]
    return [Candidate("no control variate", control_variate="none"), *others]


def _draws(module: DiffusionModule) -> dict[str, Draws]:
    found: dict[str, Draws] = {"IID": IID(), "strata": CARV(1)}
    if _has_varying_weight(module):
        found["strata, q = weight"] = CARV(1, WeightProposal())
    return found | {
        "strata, q learned": CARV(1, LearnedProposal()),
        "pairs": CARV(2, antithetic=True),
        "2 resamples": CARV(2),
        "4 resamples": CARV(4),
    }


def _has_varying_weight(module: DiffusionModule) -> bool:
    """Return whether the weight on the network's error depends on t where p has its mass."""
    objective = module.objective
    weight = objective.weight(objective.times(100))
    return bool(weight.max() - weight.min() > _LEAST_SPREAD * weight.mean())


def few_candidates(module: DiffusionModule, size: int) -> list[Candidate]:
    """Return one for each part of the noise, to measure often: references, strata, pairs.

    Args:
        module: The module that trains.
        size: Number of samples in its training set.
    """
    fitting = [n for n in _REFERENCES if n < size <= _LARGEST_BANK]
    name = f"STF({fitting[-1]})" if fitting else 'STF("batch")'
    found = [
        Candidate(name, target=STF(fitting[-1] if fitting else "batch")),
        Candidate("strata, q learned", draws=CARV(1, LearnedProposal())),
        Candidate("pairs", draws=CARV(2, antithetic=True)),
    ]
    own = {name: settings(getattr(module, name)) for name in ("target", "draws")}
    return [c for c in found if all(x != own[name] for name, x in c.config().items())]
