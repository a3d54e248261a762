"""The default candidates of modules whose estimators are draws alone, and views if they draw any.

Those with a frozen teacher are of this kind: an upstream of some cost makes each sample, and K
draws of it are a matter of variances and costs. So both are varied: how many draws there are of a
sample and what correlates them, and how many views there are of a scene.
"""

from dataclasses import replace

from lightning_vr.auditing.candidates import Candidate, settings
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import IID, Draws
from lightning_vr.estimators.proposals import LearnedProposal, WeightProposal
from lightning_vr.teachers.orbit_views import OrbitViews
from lightning_vr.training.estimator_module import EstimatorModule

_DRAWS, _MORE_DRAWS = 8, 16

_VIEWS = (1, 2, 4)


def draws_candidates(module: EstimatorModule) -> list[Candidate]:
    """Return draws and views other than the module's own, the most promising first.

    Args:
        module: The module to audit.
    """
    found: dict[str, Draws] = {
        f"{_DRAWS} draws, q = weight, pairs": CARV(_DRAWS, WeightProposal(), antithetic=True),
        f"{_DRAWS} draws, q learned, pairs": CARV(_DRAWS, LearnedProposal(), antithetic=True),
        f"{_DRAWS} draws": CARV(_DRAWS),
        "IID": IID(),
        "1 draw, q learned": CARV(1, LearnedProposal()),
        "2 draws, pairs": CARV(2, antithetic=True),
        f"{_DRAWS} draws, q = weight": CARV(_DRAWS, WeightProposal()),
        f"{_DRAWS} draws, pairs": CARV(_DRAWS, antithetic=True),
    }
    draws = [Candidate(n, draws=x) for n, x in found.items() if _differs(x, module.draws)]
    long = CARV(_MORE_DRAWS, LearnedProposal(), antithetic=True)
    last = [Candidate(f"{_MORE_DRAWS} draws, q learned, pairs", draws=long)]
    views = _views(module) if "views" in module.estimator_slots else []
    # one of each kind, then the others
    return draws[:2] + views[:2] + draws[2:] + views[2:] + last


def _views(module: EstimatorModule) -> list[Candidate]:
    own = getattr(module, "views", None)
    if not isinstance(own, OrbitViews):
        return []
    found = {"2 opposite views": replace(own, count=2, antipodal=True)}
    for count in _VIEWS:
        name = "1 view" if count == 1 else f"{count} views"
        found[name] = replace(own, count=count, antipodal=False)
    return [Candidate(name, views=x) for name, x in found.items() if x != own]


def _differs(draws: Draws, own: Draws) -> bool:
    return bool(settings(draws) != settings(own))
