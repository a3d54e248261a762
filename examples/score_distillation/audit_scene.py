"""What does an audit say of a scene before it is trained further, and is it what was measured?

The scene of ``score_distillation.py`` after 60 steps, with two views of one draw. The audit
measures its components by view, timestep and noise, and what draws and views of other numbers would
save; CPU seconds stand for the seconds of a step, so that other work of the machine does not count.

    python examples/score_distillation/audit_scene.py
    python examples/score_distillation/audit_scene.py --quick
"""

import argparse
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from scene import Gaussians
from score_distillation import RATE, VIEWS, train, trained_teacher
from torch import Tensor

from lightning_vr import (
    CARV,
    Candidate,
    Clean,
    FrozenTeacher,
    LearnedProposal,
    OrbitViews,
    ScoreDistillation,
    ScoreDistillationLoss,
    WeightProposal,
    audit,
)
from lightning_vr.auditing import save_report
from lightning_vr.auditing.report import table
from lightning_vr.core import devices
from lightning_vr.data import TwoGaussians

BASE = OrbitViews(2, VIEWS.azimuth, VIEWS.elevation)


class Scene(ScoreDistillation):
    """The digit 3 as a scene of Gaussians.

    Args:
        teacher: The teacher.
        gaussians: The scene.
        **settings: As ``ScoreDistillation`` takes them.
    """

    def __init__(self, teacher: FrozenTeacher, gaussians: Gaussians, **settings: Any) -> None:
        super().__init__(teacher, **settings)
        self.gaussians = gaussians

    def render(self, batch: Any) -> Clean:
        """Return the images of a batch's views, with their digit."""
        x: Tensor = self.gaussians(batch.azimuth, batch.elevation)
        return Clean(x, torch.full((len(x),), 3, device=x.device))


def candidates() -> list[Candidate]:
    """Return draws and views, alone and as the study combines them."""
    one = OrbitViews(1, VIEWS.azimuth, VIEWS.elevation)
    designs = {
        "uniform": CARV(8, scope="none"),
        "strata": CARV(8, scope="sample"),
        "weight": CARV(8, WeightProposal(), scope="none"),
        "weight, strata": CARV(8, WeightProposal(), scope="sample"),
        "weight, strata, pairs": CARV(8, WeightProposal(), scope="sample", antithetic=True),
    }
    studied = [Candidate(f"1 view, 8 {n}", draws=x, views=one) for n, x in designs.items()]
    pair = OrbitViews(2, VIEWS.azimuth, VIEWS.elevation, antipodal=True)
    return [
        *reversed(studied),
        Candidate("opposite, 8 draws, all", draws=designs["weight, strata, pairs"], views=pair),
        Candidate("2 views, 8 draws, all", draws=designs["weight, strata, pairs"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/score_distillation"))
    parser.add_argument("--budget", type=float, default=240.0, help="seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teacher = trained_teacher(arguments.folder, 4 if arguments.quick else 420)
    # as the study trains the scene that it measures
    trained, draws = Gaussians(supersampling=2), CARV(8, LearnedProposal(), antithetic=True)
    train(trained, ScoreDistillationLoss(teacher, draws), 3, 2 if arguments.quick else 60)
    gaussians = Gaussians(supersampling=2 if arguments.quick else 8)
    gaussians.load_state_dict(trained.state_dict())

    optimizer = partial(torch.optim.Adam, lr=RATE)
    settings = {"draws": CARV(1, scope="none"), "views": BASE, "optimizer": optimizer}
    module = Scene(teacher, gaussians, **settings)
    devices.time = SimpleNamespace(perf_counter=time.process_time)
    rivals = candidates()[:2] if arguments.quick else candidates()
    data = TwoGaussians(1, 2, num_samples=64, num_validation=2)
    found = audit(module, data, rivals, budget=5 if arguments.quick else arguments.budget)
    Console(width=120).print(table(found))
    print(found.advice)
    save_report(found, arguments.folder / "audit")


if __name__ == "__main__":
    main()
