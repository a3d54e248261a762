"""Control variates in an audit: fitted before they are measured, left out where they cannot pay."""

import copy

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import VE, Candidate, DiffusionModule, ResidualMLP, TaylorCV, audit
from lightning_vr.auditing.report import page
from lightning_vr.data.dataset import InMemoryDataset
from lightning_vr.estimators.taylor.coefficients import Cost
from lightning_vr.process.timesteps import LogUniform
from lightning_vr.training.control_measurement import ControlMeasurement

pytestmark = pytest.mark.filterwarnings("ignore:.*`max_epochs`")


class Points(LightningDataModule):
    def __init__(self):
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.points = InMemoryDataset(torch.randn(512, 2, generator=source), key="x0")

    def train_dataloader(self):
        return DataLoader(self.points, batch_size=32, shuffle=True)


def module(network=None, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = network or ResidualMLP(2, width=16, depth=1)
        nn.init.normal_(network.project_out.weight, std=0.1)
    times = LogUniform(0.002, 0.02)
    return DiffusionModule(
        network, schedule=VE(), timesteps=times, prediction="epsilon", **settings
    )


@pytest.fixture
def costing(monkeypatch):
    """Set what a control variate costs."""

    def be(cost):
        monkeypatch.setattr(ControlMeasurement, "cost", lambda *_: (cost, 1.0, 8.0))

    return be


def efficiency(found):
    return {m.name: m.efficiency.estimate for m in found.estimators}


def test_at_low_noise_it_removes_what_the_noise_adds():
    rivals = [
        Candidate("fitted", control_variate=TaylorCV(gate="open")),
        Candidate("one", control_variate=TaylorCV(gate="open", coefficient=1.0)),
        Candidate("tenfold", control_variate=TaylorCV(gate="open", coefficient=10.0)),
    ]
    found = audit(module(), Points(), rivals, budget=40, progress=False)
    saved = efficiency(found)
    assert saved["fitted"] > 2
    assert saved["one"] > 2
    assert saved["tenfold"] < 0.5
    noise = {m.name: m.components.noise[0] / m.components.total[0] for m in found.estimators}
    assert noise["fitted"] < 0.02 < 0.3 < noise["current"]


def test_a_gate_that_stays_closed_is_left_out_and_says_why(costing):
    costing(Cost(5.0, 5.0))
    rivals = [Candidate("gated", control_variate=TaylorCV())]
    found = audit(module(), Points(), rivals, budget=5, progress=False)
    assert list(efficiency(found)) == ["current"]
    assert "off in all 8 bins" in found.skipped["gated"]
    assert "11.00 times as long" in found.skipped["gated"]
    assert "Not measured: gated: off in all 8 bins" in page(found)


def test_a_gate_that_opens_is_measured(costing):
    costing(Cost(0.0, 0.01))
    rivals = [Candidate("gated", control_variate=TaylorCV())]
    found = audit(module(), Points(), rivals, budget=10, progress=False)
    assert efficiency(found)["gated"] > 2


def test_what_lacks_derivatives_is_left_out_and_says_what_to_change():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, cotangent):
            return cotangent

    class Network(ResidualMLP):
        def forward(self, x, t):
            return super().forward(Opaque.apply(x), t)

    rivals = [
        Candidate("order 0", control_variate=TaylorCV(gate="open")),
        Candidate("order 1", control_variate=TaylorCV(1, gate="open")),
    ]
    opaque = module(Network(2, width=16, depth=1))
    found = audit(opaque, Points(), rivals, budget=1, progress=False)
    assert set(efficiency(found)) == {"current", "order 0"}
    assert "use order=0" in found.skipped["order 1"]


def test_the_modules_own_is_fitted_for_the_audit_alone_and_compared_with_none():
    audited = module(control_variate=TaylorCV(gate="open"))
    before = copy.deepcopy(audited.control_variate.get_extra_state())
    rivals = [Candidate("none", control_variate="none")]
    found = audit(audited, Points(), rivals, budget=20, progress=False)
    assert efficiency(found)["none"] < 0.5
    assert audited.control_variate.get_extra_state() == before


def test_candidates_of_the_caller_stay_as_they_are():
    control = TaylorCV(gate="open")
    rivals = [Candidate("fitted", control_variate=control)]
    audit(module(), Points(), rivals, budget=1, progress=False)
    assert control.fit.state() == TaylorCV(gate="open").fit.state()
