"""The error budget of a module's sampler: its advice, what it writes, and what it refuses."""

import copy
import csv
import io
import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from rich.console import Console
from support.denoisers import MIXTURE, mixture_denoiser
from support.mixtures import quantiles, uniforms
from support.networks import small_mlp
from torch.utils.data import DataLoader

from lightning_vr import (
    DDIM,
    EDM,
    Clean,
    DiffusionModule,
    Euler,
    Heun,
    ResidualMLP,
    Sampler,
    error_budget,
    posterior_mean,
)
from lightning_vr.auditing.error_budget_report import save, table
from lightning_vr.auditing.sampling_errors import advise, alternatives
from lightning_vr.data.dataset import InMemoryDataset
from lightning_vr.process.reverse_estimate import ReverseEstimate
from lightning_vr.variance.error_budget import ErrorBudget, measure_error_budgets

pytestmark = pytest.mark.filterwarnings("ignore:.*`max_epochs`")

ENDS = {"noise_level_min": 0.1, "noise_level_max": 10.0}
POINTS = torch.tensor([[1.0, 0.2], [-0.4, 0.9], [-0.6, -1.1], [0.3, -0.2]])


class Points(LightningDataModule):
    def __init__(self, **columns):
        super().__init__()
        self.columns = columns

    def train_dataloader(self):
        data = InMemoryDataset(POINTS.repeat(8, 1), key="x0", **self.columns)
        return DataLoader(data, batch_size=8, shuffle=True)


class Exact(DiffusionModule):
    """A module that knows its training set."""

    def reverse_estimate(self, xt, t, group=None, cond=None):
        mean = posterior_mean(xt.double(), 1.0, t.double(), POINTS.double()).mean
        return ReverseEstimate(mean.to(xt), None)


class Conditioned(DiffusionModule):
    """A module whose samples each have a condition of their own."""

    def encode(self, batch):
        return Clean(batch["x0"], cond={"text": batch["x0"]})


def module(kind=DiffusionModule, **settings):
    return kind(small_mlp(std=0.1), sampler=Sampler(Euler(), steps=4, **ENDS), **settings)


def advice(kind="polynomial", rho=7.0, wrong=0.0, high=80.0, solver=None):
    """Advice on a mixture whose exact denoiser is changed by ``wrong`` times beta."""
    schedule, count = EDM(), 64
    exact = mixture_denoiser(schedule)

    def learned(xt, t):
        beta = t * 0.5 / torch.sqrt(t**2 + 0.25)
        return exact(xt, t) + wrong * (beta[:, None] * torch.sign(torch.sin(7 * xt)))

    sampler = Sampler(solver, 16, kind, rho, noise_level_min=0.02, noise_level_max=high)
    grids = alternatives(sampler, schedule)
    x = quantiles(MIXTURE, high, count)
    y = high * torch.special.ndtri(uniforms(count))
    solver = solver or Heun()
    return advise(measure_error_budgets(solver, learned, exact, schedule, grids, x, y, 0.5))


def test_advice_goes_from_the_grid_to_training_as_the_score_gets_worse():
    assert advice(rho=2.0, solver=Euler()).startswith("Take another grid, exponential: discret")
    assert advice(rho=2.0, wrong=0.5, solver=Euler()).startswith("Train more, mostly at noise")


def test_one_noise_level_is_not_named_as_a_range(monkeypatch):
    monkeypatch.setattr(ErrorBudget, "score_levels", lambda _: (2.5, 2.5))
    said = advice(rho=2.0, wrong=0.5, solver=Euler())
    assert said.startswith("Train more, mostly at a noise level of 2.5: ")


def test_advice_is_to_take_more_steps_where_no_other_grid_is_better():
    assert advice("exponential", solver=Euler()).startswith("Take more steps: discretisation")


def test_advice_is_to_begin_at_more_noise_where_the_start_is_wrong():
    assert advice(high=1.0).startswith("Begin above a noise level of 1: initialisation makes")


def test_the_exact_denoiser_has_no_error_of_the_score():
    found = error_budget(module(Exact), Points(), samples=16)
    assert found.own.learned_score < 1e-4 * found.own.bound
    worse = error_budget(module(), Points(), samples=16)
    assert worse.own.learned_score > 10 * found.own.learned_score
    assert worse.advice.startswith("Train more")


def test_a_budget_leaves_the_module_and_randomness_as_they_were():
    own = module()
    own.train()
    before, state = copy.deepcopy(own.state_dict()), torch.get_rng_state()
    first = error_budget(own, Points(), samples=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert own.training
    for name, value in own.state_dict().items():
        assert torch.equal(value, before[name])
    assert error_budget(own, Points(), samples=8).own.bound == first.own.bound


def test_class_conditional_modules_are_measured_on_their_classes():
    network = ResidualMLP(2, width=8, depth=1, num_class_embeds=5)
    own = DiffusionModule(network, num_classes=4, sampler=Sampler(steps=4, **ENDS))
    label = torch.arange(4).repeat(8)
    found = error_budget(own, Points(label=label, num_classes=4), samples=16)
    # a class has one point, which is reached without any step: x0_hat is that point
    assert found.own.discretisation < 1e-6
    assert found.own.learned_score > 0.1


def test_a_budget_is_written_as_tables_numbers_and_a_picture(tmp_path):
    found = error_budget(module(), Points(), Sampler(Heun(), steps=4, **ENDS), samples=8)
    save(found, tmp_path)
    numbers = json.loads((tmp_path / "error_budget.json").read_text())
    assert numbers["advice"] == found.advice
    assert numbers["solver"] == "Heun"
    levels = found.own.noise_levels
    assert numbers["total_weight"] == pytest.approx(
        module().objective.total_weight(levels).tolist()
    )
    rows = list(csv.DictReader((tmp_path / "error_budget.csv").read_text().splitlines()))
    own = [row for row in rows if row["grid"] == "own"]
    assert len(own) == 4
    assert [float(row["noise_levels"]) for row in own] == found.own.noise_levels.tolist()
    assert sum(row["grid"] == "twice the steps" for row in rows) == 8
    page = (tmp_path / "error_budget.md").read_text()
    assert f"| own | 4 | {found.own.initialisation:.3g} |" in page
    assert (tmp_path / "error_budget.png").stat().st_size > 10_000


def test_the_table_fits_a_terminal_of_80_columns():
    found = error_budget(module(), Points(), Sampler(Heun(), steps=4, **ENDS), samples=8)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(found))
    said = " ".join(console.export_text().split())
    assert "on the same trajectories." in said
    assert "…" not in said


def test_given_noise_levels_are_compared_with_the_usual_ones():
    found = alternatives(Sampler(Euler(), grid=[10.0, 1.0, 0.1]), EDM())
    assert found["own"].tolist() == [10.0, 1.0, 0.1]
    assert "exponential" not in found  # it is that one
    assert found["twice the steps"].tolist() == pytest.approx([10, 10**0.5, 1, 10**-0.5, 0.1])


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Sampler(DDIM(eta=1.0)), r"`solver` must be Euler\(\) or Heun\(\), .* got DDIM"),
        (Sampler(guidance=3.0), "`guidance` must be 1, .* got 3"),
    ],
)
def test_samplers_without_a_budget_are_refused(sampler, message):
    with pytest.raises(ValueError, match=message):
        error_budget(module(), Points(), sampler)


def test_what_has_no_exact_denoiser_is_refused():
    with pytest.raises(MisconfigurationException, match="`module` must be a DiffusionModule"):
        error_budget(small_mlp(), Points())
    with pytest.raises(ValueError, match="must have no condition beyond class labels"):
        error_budget(module(Conditioned), Points())
    with pytest.raises(ValueError, match="`samples` must be at least 2, got 1"):
        error_budget(module(), Points(), samples=1)
