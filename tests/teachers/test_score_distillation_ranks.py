"""Two ranks that train a scene, against one process with the views and draws of both."""

import pytest
import torch
from lightning.pytorch import Callback
from scenes import VIEWS, fit, scene, weights

from lightning_vr import CARV, LearnedProposal
from lightning_vr.core.rng import generator
from lightning_vr.core.types import StepPart
from lightning_vr.teachers.distillation import distill

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
]

STEPS = 3


class Save(Callback):
    """Writes what each rank has at the end to a file of its own."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        found = {"weights": weights(module), "table": module.draws.proposal.table}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def build():
    draws = CARV(2, LearnedProposal(bins=2, memory=0.5))
    return scene(draws, optimizer=lambda p: torch.optim.SGD(p, 0.1))


def alone(monkeypatch):
    """Three steps in one process, with the draws of both ranks."""
    module = build()
    module.seed = 5
    for step in range(STEPS):
        module.zero_grad()
        for rank in range(2):
            monkeypatch.setattr("lightning_vr.core.keyed_module.rank", lambda rank=rank: rank)
            clean = module.clean(VIEWS.draw(module.generator("views", step, 0)))
            part = StepPart(rank, 2, generator(5, "strata", step))
            source = module.generator("train", step, 0)
            given = (module.residual, module.draws, module.objective, source, part)
            found = distill(clean, *given)
            (0.5 * found.loss).backward()
            module.draws.observe(found, module.objective)
        for parameter in module.parameters():
            parameter.data -= 0.1 * parameter.grad
        module.draws.advance()
    return {"weights": weights(module), "table": module.draws.proposal.table}


def test_two_ranks_train_a_scene_as_one_process_does_and_share_what_they_learn(
    tmp_path, monkeypatch
):
    options = {
        "strategy": "ddp_fork",
        "devices": 2,
        "max_steps": STEPS,
        "use_distributed_sampler": False,
    }
    fit(build(), Save(tmp_path), **options)
    expected = alone(monkeypatch)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert float(expected["table"][2].min()) > 8  # so that the proposal counted
