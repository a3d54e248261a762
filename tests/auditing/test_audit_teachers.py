"""Audits of modules with a frozen teacher, against components that are known exactly.

The teacher is the exact one of points that are normal with mean 0 and variance 1 in each
coordinate, and a view at the angle a shows ``x = (cos(a) θ_1, θ_2)``, with J = diag(cos(a), 1).
With ``alpha² + sigma² = 1`` the noise prediction is ``sigma x_t``, so that one draw gives

    g = w Jᵀ (alpha sigma x - alpha² noise).

For uniform angles the mean of cos² is 1/2, its variance is 1/8.
"""

import pytest
import torch
from support.networks import small_mlp
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import (
    CARV,
    DSM,
    IID,
    VP,
    AuditDuringTraining,
    Candidate,
    DistributionMatching,
    FrozenTeacher,
    LearnedProposal,
    OrbitViews,
    ScoreDistillation,
    WeightProposal,
    audit,
)
from lightning_vr.auditing import audit_during_training
from lightning_vr.auditing.comparison import Comparison
from lightning_vr.auditing.default_candidates import few_candidates_for
from lightning_vr.auditing.report import page
from lightning_vr.auditing.step_cost import step_cost
from lightning_vr.core.rng import generator
from lightning_vr.data import TwoGaussians
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.accounting import best_resamples

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`max_epochs`"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
]

VIEWS = OrbitViews(4)


class Exact(nn.Module):
    def forward(self, x, t):
        sigma = VP().sigma(t / 1000)
        return sigma[:, None] * x


class Scene(ScoreDistillation):
    def __init__(self, **settings):
        settings = {"draws": IID(), "views": VIEWS} | settings
        super().__init__(FrozenTeacher(Exact(), VP()), **settings)
        self.theta = nn.Parameter(torch.tensor([2.0, 0.5]))

    def render(self, batch):
        first = batch.azimuth.cos() * self.theta[0]
        return torch.stack([first, self.theta[1].expand_as(first)], dim=1)


def data():
    return TwoGaussians(2, 2, num_samples=32, num_validation=2)


def known(resamples=1):
    """Return V between views, of time and of noise, for independent draws of each view."""
    objective = Scene().objective
    t = objective.timesteps.middles(20_000, "cpu").double()
    alpha, sigma, weight = VP().alpha(t), VP().sigma(t), objective.weight(t)
    pull, spread = weight * alpha * sigma, weight * alpha**2
    first, second = 2.0**2, 0.5**2
    view = float(pull.mean() ** 2) * first / 8
    time = float(pull.var()) * (first * 3 / 8 + second)
    noise = float(spread.square().mean()) * 1.5
    return torch.tensor([view, time / resamples, noise / resamples], dtype=torch.float64)


@pytest.fixture(scope="module")
def audited():
    rivals = [
        Candidate("4 draws", draws=CARV(4, scope="none")),
        Candidate("1 view", views=OrbitViews(1)),
        Candidate("opposite", views=OrbitViews(2, antipodal=True)),
    ]
    torch.manual_seed(0)
    return audit(Scene(), data(), rivals, budget=110, progress=False)


def test_components_are_those_of_views_times_and_noise(audited):
    by_name = {each.name: each for each in audited.estimators}
    expected = {
        "current": known(),
        "4 draws": known(4),
        # of the batch's gradient, times the 4 views that the current estimator has
        "1 view": 4 * known(),
        # cos² is alike on opposite sides: two views for one
        "opposite": torch.tensor([2 * 2, 2, 2]) * known(),
    }
    for name, parts in expected.items():
        found = by_name[name]
        measured, error = (torch.stack(x[:4])[:, 0] for x in (found.components, found.errors))
        whole = torch.cat([parts, parts.sum(dim=0, keepdim=True)])
        assert ((measured - whole) / error).abs().max() < 4, (name, measured, whole)
        assert float(error[3] / whole[3]) < 0.4, name


def test_what_pays_is_found_and_reports_speak_of_views(audited):
    found = audited
    assert found.batch == 4
    assert found.statistics.parts == ("view", "timestep", "noise")
    text = page(found)
    assert "Parts: view/timestep/noise in %" in text
    assert "noise draws per view" in text
    efficiency = {each.name: each.efficiency for each in found.estimators}
    assert efficiency["4 draws"].low > 1 > efficiency["1 view"].high
    assert found.recommended is not None
    views = next(each for each in found.estimators if each.name == "opposite").config["views"]
    assert views["init_args"]["antipodal"] is True


def test_views_and_draws_are_combined_and_a_learned_proposal_has_learned():
    rivals = [
        Candidate("8 views", views=OrbitViews(8)),
        Candidate("learned", draws=CARV(4, LearnedProposal(bins=4), antithetic=True)),
    ]
    module = Scene()
    found = audit(module, data(), rivals, budget=15, progress=False)
    assert "8 views, learned" in {each.name for each in found.finalists}
    assert module.views == VIEWS
    assert isinstance(module.draws, IID)
    assert rivals[1].draws.proposal.table.sum() == 0  # a copy has learned


def test_training_after_an_audit_is_what_it_would_have_been():
    def trained(is_audited):
        torch.manual_seed(0)
        module = Scene(draws=CARV(4, LearnedProposal(bins=4)))
        if is_audited:
            audit(module, data(), [Candidate("1", views=OrbitViews(1))], budget=1, progress=False)
        torch.manual_seed(1)
        quiet_trainer(max_epochs=1, limit_val_batches=0).fit(module, data())
        return module.theta.detach()

    assert torch.equal(trained(True), trained(False))


def learning():
    return CARV(2, LearnedProposal(bins=2))


def student(fake_steps=2):
    teacher = FrozenTeacher(small_mlp(std=1.0), VP(), "x0")
    return DistributionMatching(teacher, fake_steps=fake_steps, normalizer=False)


@pytest.mark.parametrize(
    ("build", "loader", "batch", "step"),
    [
        (lambda: Scene(draws=learning()), lambda: DataLoader(torch.arange(32), 2), 4, 5),
        (lambda: student(fake_steps=1), data, 2, 6),
    ],
    ids=["scene", "student"],
)
def test_audits_within_a_run_change_nothing_of_it(build, loader, batch, step, monkeypatch):
    """A step of the student counts as two; a scene's batch is its views."""

    def trained(*callbacks):
        torch.manual_seed(0)
        module = build()
        options = {"max_epochs": 1, "limit_train_batches": 12, "limit_val_batches": 0}
        quiet_trainer(*callbacks, **options).fit(module, loader())
        table = getattr(module.draws.proposal, "table", torch.empty(0))
        return [*module.parameters(), table, torch.get_rng_state()]

    def compared(module, size):
        sizes.append(size)
        return Comparison(module, size)

    sizes = []
    monkeypatch.setattr(audit_during_training, "Comparison", compared)
    watch = AuditDuringTraining([Candidate("q", draws=learning())], 5, repetitions=3)
    watched, plain = trained(watch), trained()
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))
    assert watch.history.state()[0]["step"] == step
    assert set(sizes) == {batch}


def test_small_audits_compare_draws_and_where_there_are_any_views():
    draws = ["8 draws, q = weight, pairs", "8 draws, q learned, pairs", "8 draws"]
    assert [each.name for each in few_candidates_for(student(), None)] == draws
    viewed = [*draws[:2], "2 opposite views"]
    assert [each.name for each in few_candidates_for(Scene(), None)] == viewed


def test_a_student_is_audited_with_the_steps_of_the_fake_model_in_its_cost(monkeypatch):
    estimate, steps = DistributionMatching._fake_estimate, []

    def counted(self, like, step):
        steps.append(step)
        return estimate(self, like, step)

    monkeypatch.setattr(DistributionMatching, "_fake_estimate", counted)
    module = student()
    before = [p.clone() for p in module.parameters()]
    rivals = [Candidate("4 draws", draws=CARV(4, scope="none"))]
    found = audit(module, data(), rivals, budget=10, progress=False)
    assert found.statistics.parts == ("sample", "timestep", "noise")
    assert set(steps) == {0, 1}
    # the optimizer's second, and one for the fake model's steps
    assert found.cost.fixed.estimate == 2
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_the_cost_of_an_upstream_in_training_is_told_from_passes_of_more_draws():
    # 0.5 s to encode each of 4 views, 1 s for each on the way back, 0.1 s a draw
    passes = {4 * k: torch.full((5,), 4 * 1.0 + 0.1 * 4 * k) for k in (2, 8)}
    seconds = torch.full((5,), 2.0), torch.full((5,), 0.3)
    cost = step_cost(passes, *seconds, 4, through_upstream=True)
    assert cost.upstream == pytest.approx([1.5] * 3)
    assert cost.denoise == pytest.approx([0.1] * 3)
    assert cost.fixed == pytest.approx([0.3] * 3)
    assert best_resamples(1.0, 1.0, cost.model) == 4  # K² = 15


def test_slots_that_a_module_lacks_are_refused_in_one_line():
    for rival, reason in (
        (Candidate("plain", target=DSM()), "fills `target`, which a Scene does not have"),
        (Candidate("none", control_variate="none"), "fill `draws` or `views`"),
    ):
        with pytest.raises(ValueError, match=reason) as refused:
            audit(Scene(), data(), [rival], budget=1, progress=False)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("draws", [IID(), CARV(4, WeightProposal(), antithetic=True)])
def test_a_distillation_shows_its_draws_what_a_step_would(draws, monkeypatch):
    module, seen = Scene(draws=draws), []
    monkeypatch.setattr(type(draws), "observe", lambda _, estimate, __: seen.append(estimate))
    clean = module.clean(VIEWS.draw(generator("views")))
    module.noisy_loss().observe(clean, generator("draws"))
    (estimate,) = seen
    objective, noised = module.objective, estimate.noised
    weight = noised.weight * objective.weight(noised.t)
    expected = weight * module.residual(noised).square().mean(dim=1)
    torch.testing.assert_close(estimate.per_draw, expected)
    assert not isinstance(module.noisy_loss(), DiffusionLoss)


def test_draws_that_leave_k_open_get_the_k_of_a_pilot_on_views(monkeypatch):
    monkeypatch.setattr("lightning_vr.training.resamples_pilot._LEAST_GAIN", 1.0)  # however cheap
    rivals = [Candidate("auto", draws=CARV(max_resamples=4))]
    found = audit(Scene(), data(), rivals, budget=5, progress=False)
    (auto,) = found.estimators[1:]
    assert auto.draws_per_sample in (1, 2, 3, 4)
    assert not found.skipped
    assert rivals[0].draws.pilot is None  # a copy was measured
