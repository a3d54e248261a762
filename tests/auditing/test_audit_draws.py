"""Draws in an audit: resamples where they pay, proposals that have learned, modules left alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from support.comparisons import assert_equal
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import (
    CARV,
    IID,
    Candidate,
    Clean,
    DiffusionModule,
    LearnedProposal,
    ResidualMLP,
    audit,
)
from lightning_vr.auditing.report import page
from lightning_vr.auditing.step_cost import step_cost
from lightning_vr.core import devices as timing
from lightning_vr.data import EightGaussians
from lightning_vr.data.dataset import InMemoryDataset
from lightning_vr.estimators.proposals import TableProposal
from lightning_vr.variance.gradient_measurement import GradientMeasurement

pytestmark = pytest.mark.filterwarnings("ignore:.*`max_epochs`")


class Work:
    """What was worked, in seconds of a machine that nobody else uses."""

    seconds = 0.0


@pytest.fixture
def counted(monkeypatch):
    """Let steps take as long as the work that they do."""
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: Work.seconds))


class Upstream(DiffusionModule):
    """Points that an expensive network could have encoded."""

    work = 0

    def encode(self, batch):
        Work.seconds += 1e-3 * self.work * len(batch["x0"])
        return Clean(batch["x0"], index=batch["index"])


class Network(nn.Module):
    """A linear map of x, so that gradients are short to take."""

    def __init__(self, weight=(0.5, -0.5)):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x, t):
        Work.seconds += 1e-3 * len(x)
        return self.weight * x


class Points(LightningDataModule):
    """Points that are nearly the same: all variance is of times and noise."""

    def __init__(self, spread=0.01):
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.points = InMemoryDataset(spread * torch.randn(512, 2, generator=source), key="x0")

    def train_dataloader(self):
        return DataLoader(self.points, batch_size=32, shuffle=True)


TRAINED = (-0.8956, -0.8948)
"""Weights at which the gradient has mean zero, so that noise is the bottleneck."""


def upstream(draws=None, work=0, weight=(0.5, -0.5)):
    module = Upstream(Network(weight), draws=draws)
    module.work = work
    return module


def module(draws=None, network=None):
    torch.manual_seed(0)
    network = network or ResidualMLP(width=16, depth=1)
    torch.nn.init.normal_(network.project_out.weight, std=0.1)
    return DiffusionModule(network, draws=draws)


def points(**settings):
    return EightGaussians(
        **({"batch_size": 32, "num_samples": 512, "num_validation": 32} | settings)
    )


@pytest.fixture
def measured(monkeypatch):
    """Every measurement's draws, in order, with the density that they had."""
    seen, real = [], GradientMeasurement.by_differences

    def spy(self, *args, **kwargs):
        model = self.loss.module
        proposal = getattr(model.draws, "proposal", None)
        table = None if proposal is None else proposal(model.objective, model.device)
        seen.append((model.draws, table))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GradientMeasurement, "by_differences", spy)
    return seen


def test_resamples_are_recommended_where_encoding_is_dear_and_not_where_it_is_free(counted):
    rivals = [Candidate("4 resamples", draws=CARV(4))]
    trained = upstream(work=30, weight=TRAINED)
    dear = audit(trained, Points(), rivals, budget=100, progress=False)
    assert dear.recommended.name == "4 resamples"
    assert dear.recommended.efficiency.low > 3
    assert dear.recommended.draws_per_sample == 4
    best, gain = dear.resamples
    assert best > 4
    assert gain > 2

    free = audit(upstream(), Points(1.0), rivals, budget=100, progress=False)
    assert free.recommended is None
    assert free.estimators[1].predicted_speedup.high < 1
    assert not free.finalists
    assert free.seconds < 100
    assert free.resamples[0] == 1
    assert "one noise draw per sample is best" in page(free)


def test_k_independent_draws_of_a_sample_have_the_kth_part_of_the_variance_within_it():
    rivals = [Candidate("four", draws=CARV(4, scope="none"))]
    found = audit(upstream(), Points(spread=0.0), rivals, budget=100, progress=False)
    efficiency = found.estimators[1].efficiency
    assert efficiency.low < 4 < efficiency.high
    assert efficiency.high - efficiency.low < 4
    parts, error = found.estimators[1].components, found.estimators[1].errors
    assert abs(float(parts.data[0] / error.data[0])) < 4


def test_the_best_number_of_draws_is_found_from_any_number(counted):
    by_one = audit(upstream(work=30), Points(0.5), [], budget=100, progress=False)
    by_four = audit(
        upstream(CARV(4, scope="none"), work=30), Points(0.5), [], budget=100, progress=False
    )
    assert by_four.current.draws_per_sample == 4
    for found in (by_one, by_four):
        assert found.cost.model.upstream == pytest.approx(30e-3)
        assert found.cost.model.denoise == pytest.approx(1e-3)
    within = [
        a.current.draws_per_sample
        * float((a.current.components.timestep + a.current.components.noise)[0])
        for a in (by_one, by_four)
    ]
    assert within[0] == pytest.approx(within[1], rel=0.3)


def test_the_cost_of_a_draw_is_told_from_passes_of_several_draws_of_each_sample():
    # 3 s a step and 0.1 s a row, four rows for each of the samples
    passes = {4 * samples: torch.full((5,), 3 + 0.1 * 4 * samples) for samples in (8, 32)}
    cost = step_cost(passes, torch.full((5,), 64.0), torch.ones(5), 32)
    assert cost.denoise == pytest.approx([0.1] * 3)
    assert cost.upstream == pytest.approx([2.0] * 3)
    assert cost.fixed == pytest.approx([4.0] * 3)


def test_the_cost_of_a_draw_is_not_resolved_without_a_smaller_batch_or_in_noise():
    one = step_cost({8: torch.full((5,), 1.6)}, torch.ones(5), torch.ones(5), 2)
    assert one.denoise == pytest.approx((0.2, 0.0, 0.2))
    turns = torch.tensor([0.8, 0.9, 1.0, 1.1, 1.2])
    noisy = step_cost({8: turns, 32: turns.flip(0)}, torch.ones(5), torch.ones(5), 32)
    assert noisy.denoise.low < 0 < noisy.denoise.high
    assert noisy.denoise.estimate == pytest.approx(0, abs=1e-8)


def test_a_proposal_has_learned_when_it_is_measured_and_the_modules_own_is_as_it_was(measured):
    model = module(CARV(1, LearnedProposal(bins=8)))
    before, own = copy.deepcopy(model.state_dict()), model.draws
    rival = Candidate("loss", draws=CARV(2, LearnedProposal("loss", bins=8)))
    audit(model, points(), [rival], budget=1, progress=False)
    assert len({draws for draws, _ in measured}) == 2
    for draws, table in measured:
        assert draws is not own
        assert table.left.std() > 0.1
    assert model.draws is own
    assert_equal(model.state_dict(), before)
    assert not rival.draws.proposal.table.any()


def test_what_the_modules_proposal_has_learned_in_training_is_what_is_measured(measured):
    model = module(CARV(1, LearnedProposal(bins=2)))
    model.draws.proposal.table.copy_(torch.tensor([[400.0, 100.0], [100.0, 100.0], [99.0, 99.0]]))
    expected = model.draws.proposal(model.objective, torch.device("cpu"))
    audit(model, points(), [], budget=1, progress=False)
    for _, table in measured:
        assert torch.equal(table.left, expected.left)
    # sqrt(4) to sqrt(1), over a floor of a tenth
    assert expected.left[0] / expected.left[1] == pytest.approx((0.9 * 4 / 3 + 0.1) / 0.7)


def test_draws_that_choose_k_are_measured_at_the_k_that_they_would_choose(measured, counted):
    model = upstream(CARV("auto", max_resamples=8), work=30)
    found = audit(model, Points(), [Candidate("one", draws=IID())], budget=60, progress=False)
    assert found.current.draws_per_sample == 8
    assert found.estimators[1].draws_per_sample == 1
    assert found.estimators[1].efficiency.high < 1
    assert model.draws.draws_per_sample == 1
    assert model.draws.pilot is None
    cheap = audit(upstream(CARV("auto")), Points(), [], budget=1, progress=False)
    assert cheap.current.draws_per_sample == 1


def test_draws_that_do_not_fit_the_network_are_left_out_and_named():
    network = ResidualMLP(width=16, depth=1)
    network.add_module("unused", nn.BatchNorm1d(16))
    found = audit(
        module(network=network),
        points(),
        [Candidate("two", draws=CARV(2)), Candidate("one", draws=CARV(1))],
        budget=1,
        progress=False,
    )
    assert [m.name for m in found.estimators] == ["current", "one"]
    assert "batch normalisation" in found.skipped["two"]


def test_a_candidate_that_surely_loses_is_not_looked_at_again(measured, counted):
    # weights of 5 in nine tenths of p: at equal seconds several times the variance
    worse = CARV(1, TableProposal([1.0, *[0.02] * 9]), scope="none")
    rivals = [Candidate("worse", draws=worse), Candidate("same", draws=CARV(1, scope="none"))]
    found = audit(upstream(), Points(), rivals, budget=200, progress=False)
    assert [each.name for each in found.finalists] in ([], ["same"])
    assert found.estimators[1].predicted_speedup.high < 0.8
    assert sum(table is not None for _, table in measured) == found.repetitions
