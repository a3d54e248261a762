"""An audit of a scene on two ranks, against one process in place of each of them."""

import json
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from support.audits import Clock
from support.ranks import launch
from support.trainers import quiet_trainer
from test_audit_teachers import Scene, data

from lightning_vr import CARV, Candidate, OrbitViews, audit
from lightning_vr.auditing import candidate_measurement, measurement
from lightning_vr.core import devices

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*`max_epochs`"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
]


class SlowClock(Clock):
    """A clock by which all takes three times as long."""

    def __call__(self):
        self.now += 2.0
        return super().__call__()


def audited(*rivals, **options):
    rivals = [Candidate("opposite", views=OrbitViews(2, antipodal=True)), *rivals]
    torch.manual_seed(0)
    trainer = quiet_trainer(**options)
    found = audit(Scene(), data(), rivals, budget=1, progress=False, trainer=trainer)
    return found.to_dict() | {"seconds": None}


def test_two_ranks_audit_a_scene_alike_and_as_one_process_does_for_each(tmp_path, monkeypatch):
    # which candidates come again depends on all of them
    monkeypatch.setattr(measurement, "finalists", lambda *_: [])

    def on_rank(rank):
        if rank == 1:
            devices.time = SimpleNamespace(perf_counter=SlowClock())
        auto = Candidate("auto", draws=CARV(max_resamples=4))
        strategy = DDPStrategy(timeout=timedelta(seconds=60))
        found = audited(auto, strategy=strategy, devices=2)
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))

    launch(on_rank, 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["batch"] == 2 * 4
    assert first["cost"]["fixed"]["estimate"] == 2 * 2  # for the optimizer and for nothing else

    alone = []
    for rank in range(2):
        monkeypatch.setattr(candidate_measurement, "rank", lambda rank=rank: rank)
        alone.append(audited())
    runs = [{x["name"]: x["components"] for x in run["estimators"]} for run in (first, *alone)]
    assert runs[0].keys() == {"current", "opposite", "auto"}
    for name in ("current", "opposite"):
        for part, found in runs[0][name].items():
            expected = sum(torch.tensor(run[name][part]) for run in runs[1:]) / 2
            torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-7)
