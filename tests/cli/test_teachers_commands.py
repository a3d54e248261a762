"""Modules with a frozen teacher on the command line."""

import json

import pytest
import torch
from commands import POINTS, write
from support.audits import counted_looks
from support.trainers import quiet_trainer
from torch import nn

from lightning_vr import (
    VP,
    VRCLI,
    DiffusionModule,
    DistributionMatching,
    FrozenTeacher,
    ResidualMLP,
    ScoreDistillation,
)
from lightning_vr.cli.checkpoint_settings import changed_optimization
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle.trust import Trust

pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*`max_epochs`"),
]


class Point(ScoreDistillation):
    """A point in the plane, which every view shows."""

    def __init__(self, teacher: FrozenTeacher, **settings):
        super().__init__(teacher, **settings)
        self.point = nn.Parameter(torch.ones(2))

    def render(self, batch):
        return self.point.expand(len(batch.azimuth), 2)


@pytest.fixture
def teacher(folder):
    """Settings of a teacher that comes from a checkpoint."""
    module = DiffusionModule(ResidualMLP(width=8, depth=1), schedule=VP(), prediction="epsilon")
    nn.init.normal_(module.network.project_out.weight)
    trainer = quiet_trainer(max_steps=0)
    trainer.fit(module, EightGaussians(8, num_samples=8, num_validation=8))
    trainer.save_checkpoint(folder / "teacher.ckpt")
    made_by = "lightning_vr.FrozenTeacher.from_checkpoint"
    return {"class_path": made_by, "init_args": {"path": "teacher.ckpt"}}


@pytest.fixture
def scene(folder, teacher):
    """A configuration of the user's own class, with poor draws."""
    draws = {"class_path": "CARV", "init_args": {"resamples": 1, "scope": "none"}}
    views = {"class_path": "OrbitViews", "init_args": {"count": 4}}
    arguments = {"teacher": teacher, "draws": draws, "views": views}
    model = {"class_path": f"{__name__}.Point", "init_args": arguments}
    return f"--config={write(folder / 'scene.yaml', model=model)}"


def test_a_scene_is_trained_and_audited_and_takes_what_is_recommended(run, refused, folder, scene):
    run("fit", scene, "--trainer.callbacks+=AuditDuringTraining", network=[])
    # the checkpoint does not hold the teacher
    assert "`teacher` of the module" in refused("audit", "--ckpt_path=last", network=[])

    better = {"class_path": "CARV", "init_args": {"resamples": 4, "antithetic": True}}
    listed = folder / "candidates.yaml"
    listed.write_text(json.dumps([{"name": "pairs", "draws": better}]))
    given = [scene, "--ckpt_path=last", "--budget=1", f"--candidates={listed}"]
    with counted_looks():
        audited = run("audit", *given, network=[])
    found = json.loads((audited / "audit.json").read_text())
    assert found["recommended"] == "pairs"
    assert found["batch"] == 4

    args = [scene, f"--config={audited / 'recommended.yaml'}", *POINTS]
    module = VRCLI(args=args, run=False).model
    assert isinstance(module, Point)
    assert module.draws.resamples == 4
    assert (module.draws.antithetic, module.draws.scope) == (True, "auto")


def test_what_a_scene_cannot_do_is_refused_in_one_line(refused, scene):
    for command in ("predict", "export --output x"):
        said = refused(*command.split(), scene, network=[], data=[])
        assert "`model` must be a DiffusionModule for" in said
        assert "got a Point" in said
    wrong = "--model.teacher.path=nowhere.ckpt"
    assert "there is no file nowhere.ckpt" in refused("fit", scene, wrong, network=[])
    wrong = "--model.teacher.pth=nowhere.ckpt"
    assert "is not an argument of from_checkpoint" in refused("fit", scene, wrong, network=[])


def test_the_optimizer_of_a_fake_model_is_that_of_the_checkpoint():
    path = f"{DistributionMatching.__module__}.DistributionMatching"
    now, then = ({"class_path": f"torch.optim.{name}"} for name in ("SGD", "Adam"))
    model = {"class_path": path, "init_args": {"fake_optimizer": now}}
    checkpoint = {"hyper_parameters": {"_class_path": path, "fake_optimizer": then}}
    (change,) = changed_optimization(model, checkpoint, Trust("student.ckpt"))
    assert change.name == "model.fake_optimizer"
    assert change.saved.endswith("Adam")
