"""Score distillation in a loop of one's own, against the same estimate written out."""

import pytest
import torch
from diffusers import DDPMScheduler
from support.networks import small_mlp, small_unet
from torch import nn

import lightning_vr
from lightning_vr import (
    CARV,
    IID,
    VP,
    Clean,
    DistillationWeighting,
    FrozenTeacher,
    LearnedProposal,
    ScoreDistillationLoss,
    TableProposal,
    UniformSteps,
    WeightProposal,
)
from lightning_vr.core.rng import generator
from lightning_vr.process.schedules import expand
from lightning_vr.process.timesteps import Uniform
from lightning_vr.teachers.distillation import distill

VIEWS = torch.randn(6, 2, generator=generator("views"), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])


def renderer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def teacher(guidance=3.0):
    network = small_mlp(std=1.0, num_class_embeds=3).double()
    return FrozenTeacher(network, VP(), num_classes=2, guidance=guidance)


def jacobian():
    """dx/dθ of each view ``(6, 2, P)``."""
    upstream = renderer()
    parameters = dict(upstream.named_parameters())
    found = torch.func.jacrev(lambda p: torch.func.functional_call(upstream, p, (VIEWS,)))(
        parameters
    )
    return torch.cat([each.flatten(2) for each in found.values()], dim=2).detach()


def gradients(loss, key=0, copies=1500):
    """Gradients by the renderer's parameters of independent draws for the same views ``(n, P)``."""
    x = renderer()(VIEWS.repeat(copies, 1)).detach().requires_grad_()
    found = loss(x, group=LABELS.repeat(copies), source=generator(key))
    return torch.einsum("nri,rip->np", found.gradient.reshape(copies, 6, 2), jacobian()) / 6


def by_hand(teacher, change=lambda residual: residual, copies=6000):
    """The same of a loop with one draw of each view and the network's own two passes."""
    source, network = generator("hand"), teacher.model.network
    x, labels = renderer()(VIEWS.repeat(copies, 1)).detach(), LABELS.repeat(copies)
    low, high = 0.02, 0.98
    t = 1e-5 + (1 - 1e-5) * (low + (high - low) * torch.rand(6 * copies, generator=source).double())
    noise = torch.randn(6 * copies, 2, generator=source, dtype=torch.float64)
    alpha, sigma = VP().alpha(t)[:, None], VP().sigma(t)[:, None]
    with torch.no_grad():
        xt = alpha * x + sigma * noise
        text, null = (
            network(xt, 1000 * t, labels),
            network(xt, 1000 * t, torch.full_like(labels, 2)),
        )
    residual = change(null + teacher.guidance * (text - null) - noise)
    direction = (alpha * sigma**2 * residual).reshape(copies, 6, 2)
    return torch.einsum("nri,rip->np", direction, jacobian()) / 6


def z_scores(found, expected):
    error = (found.var(0) / len(found) + expected.var(0) / len(expected)).sqrt()
    return (found.mean(0) - expected.mean(0)) / error


@pytest.fixture(scope="module")
def hand_made():
    return by_hand(teacher())


OPTIONS = {
    "IID": IID,
    "K = 4": lambda: CARV(4, scope="none"),
    "strata in a sample": lambda: CARV(4, scope="sample"),
    "strata over the step": lambda: CARV(1, scope="global"),
    "nested strata": lambda: CARV(4),
    "weight": lambda: CARV(2, WeightProposal()),
    "table": lambda: CARV(2, TableProposal([1.0, 3.0, 2.0, 0.5])),
    "pairs": lambda: CARV(2, antithetic=True),
    "pairs at some levels": lambda: CARV(2, antithetic=(0.1, 2.0)),
    "chunks": lambda: CARV(2, chunk_size=7001),
    "all": lambda: CARV(4, WeightProposal(), antithetic=True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_mean_gradient_is_that_of_a_plain_loop_with_one_draw(name, hand_made):
    found = gradients(ScoreDistillationLoss(teacher(), OPTIONS[name]()))
    assert float(z_scores(found, hand_made).abs().max()) < 4.5
    assert float(found.var(0).sum()) < 1.1 * float(hand_made.var(0).sum())


def test_the_z_test_would_find_a_bias(hand_made):
    loss = ScoreDistillationLoss(teacher(), CARV(2), time_range=(0.02, 0.9))
    assert float(z_scores(gradients(loss), hand_made).abs().max()) > 6


def test_a_proposal_that_learns_meanwhile_leaves_the_mean_and_learns(hand_made):
    """It learned nothing before: nobody told it what the draws gave."""
    proposal = LearnedProposal(bins=8, floor=0.01, memory=0.999)
    loss = ScoreDistillationLoss(teacher(), CARV(2, proposal))
    found = []
    for i in range(15):
        found.append(gradients(loss, ("learned", i), copies=100))
        loss.advance()
    assert float(z_scores(torch.cat(found), hand_made).abs().max()) < 4.5

    plain = ScoreDistillationLoss(teacher(), IID())
    x0 = renderer()(VIEWS.repeat(2000, 1))
    seen = plain(x0, group=LABELS.repeat(2000))
    weight = loss.objective.weight(seen.noised.t)
    moment = (weight[:, None] * seen.residual).square().sum(1)
    bins = (8 * loss.objective.timesteps.cdf(seen.noised.t)).long().clamp(max=7)
    oracle = torch.stack([moment[bins == i].mean().sqrt() for i in range(8)])
    h = proposal(loss.objective, torch.device("cpu"))((torch.arange(8).double() + 0.5) / 8)
    torch.testing.assert_close(h, (8 * oracle / oracle.sum()).double(), rtol=0.15, atol=0.02)
    assert float(h.max() / h.min()) > 3


@pytest.mark.parametrize("draws", [IID(), CARV(4, WeightProposal(), antithetic=True)])
def test_the_gradient_is_that_of_each_output_against_its_mean_weighted_residual(draws):
    frozen, upstream = teacher(), renderer()
    loss = ScoreDistillationLoss(frozen, draws, DistillationWeighting("uniform"))
    x = upstream(VIEWS)
    found = loss(x, group=LABELS, source=generator(0))
    noised = draws(Clean(x.detach(), LABELS), loss.objective, generator(0))
    weight = noised.weight * loss.objective.weight(noised.t)
    directions = weight[:, None] * frozen.noise_residual(noised)
    means = directions.reshape(6, -1, 2).mean(1)
    torch.testing.assert_close(found.gradient, means, rtol=1e-6, atol=1e-9)
    assert found.loss.item() == pytest.approx(0.5 * float(means.square().sum()) / 6)
    parameters = list(upstream.parameters())
    expected = torch.autograd.grad((x * means).sum() / 6, parameters, retain_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, parameters), expected, rtol=1e-5, atol=1e-8
    )


def test_the_upstream_has_one_backward_pass_and_the_teacher_none_whatever_the_draws():
    upstream, passes = renderer(), []
    upstream[2].register_full_backward_hook(lambda *_: passes.append(1))
    frozen = teacher()
    found = ScoreDistillationLoss(frozen, CARV(16))(upstream(VIEWS), group=LABELS)
    found.loss.backward()
    assert passes == [1]
    assert len(found.per_draw) == 96
    assert all(p.grad is None for p in frozen.model.parameters())


def normalised(residual):
    return residual / residual.abs().mean(dim=1, keepdim=True)


def clipped(residual):
    return residual / residual.norm(dim=1, keepdim=True).clamp(min=0.5)


@pytest.mark.parametrize("change", [normalised, clipped])
def test_a_residual_may_be_clipped_or_normalised_whatever_the_number_of_draws(change):
    """That is done before the weight p/q; what came after it depended on the proposal."""
    frozen = teacher()
    residual = lambda noised: change(frozen.noise_residual(noised))  # noqa: E731
    loss = ScoreDistillationLoss(frozen, CARV(4, WeightProposal()), residual=residual)
    assert float(z_scores(gradients(loss), by_hand(frozen, change)).abs().max()) < 4.5


@pytest.mark.parametrize(
    ("kind", "power"), [("alpha_sigma2", (1, 2)), ("sigma2", (0, 2)), ("uniform", (0, 0))]
)
def test_the_weight_on_the_noise_residual_is_the_one_that_is_named(kind, power, schedule):
    t = schedule.default_timesteps()(torch.linspace(0.05, 0.95, 7, dtype=torch.float64))
    loss = FrozenTeacher(small_mlp(), schedule).objective(DistillationWeighting(kind), (0.1, 0.9))
    expected = schedule.alpha(t) ** power[0] * schedule.sigma(t) ** power[1]
    torch.testing.assert_close(loss.weight(t), expected)


def unet_loss(draws=None, time_range=(0.02, 0.98)):
    frozen = FrozenTeacher(small_unet(), DDPMScheduler())
    return ScoreDistillationLoss(frozen, draws, time_range=time_range)


def test_discrete_times_have_a_range_and_weights_stay_exact_within_it():
    loss = unet_loss(CARV(64, WeightProposal()), (0.02, 0.5))
    found = loss(torch.zeros(8, 1, 8, 8, requires_grad=True))
    t = found.noised.t
    assert isinstance(loss.objective.timesteps, UniformSteps)
    assert torch.equal(t, t.round())
    assert (int(t.min()), int(t.max())) >= (20, 480)
    assert int(t.max()) < 500
    products = found.noised.loss_weight
    torch.testing.assert_close(products, products[:1].expand_as(products), rtol=1e-6, atol=0)


def test_the_range_of_times_may_be_annealed_in_training():
    loss = unet_loss(CARV(32))
    x0 = torch.zeros(2, 1, 8, 8, requires_grad=True)
    assert float(loss(x0).noised.t.max()) > 800
    loss.time_range = (0.02, 0.5)
    assert float(loss(x0).noised.t.max()) < 500
    with pytest.raises(ValueError, match="`time_range` must be two fractions low < high"):
        loss.time_range = (0.5, 0.02)


class Prompted(nn.Module):
    """A network that keeps what it was called with."""

    def forward(self, x, t, text=None, added=None):
        self.seen = (t, text, added)
        return x + text + added["size"]


def test_networks_get_embedded_times_and_each_draw_gets_the_prompt_of_its_view():
    network = Prompted()
    loss = ScoreDistillationLoss(FrozenTeacher(network, VP()), CARV(3))
    x0 = torch.zeros(2, 2, requires_grad=True)
    one = {"text": torch.ones(1, 2), "added": {"size": torch.tensor([[1.0], [2.0]])}}
    found = loss(x0, cond=one)
    t, text, added = network.seen
    torch.testing.assert_close(t, 1000 * found.noised.t)
    assert torch.equal(text, torch.ones(6, 2))
    assert added["size"].flatten().tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: unet_loss(CARV()), "`resamples` must be a number .* got 'auto'"),
        (lambda: unet_loss(CARV(2, TableProposal([0, 0, 1, 1]))), "`proposal` must be positive"),
        (lambda: unet_loss(CARV(2, LearnedProposal("bound"))), "`moment` must be"),
        (lambda: unet_loss(time_range=(0.9, 0.1)), "`time_range` must be"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line_when_built(build, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        build()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("residual", "x0", "reason"),
    [
        (
            lambda noised: noised.noise.mean(1, keepdim=True),
            None,
            r"`residual` must return the sha",
        ),
        (lambda noised: noised.noise[:1], None, r"`residual` must return the shape"),
        (lambda noised: noised.noise / 0.0, None, "must be finite, but the teacher's residual"),
        (None, torch.full((2, 2), torch.nan, requires_grad=True), "must be finite, but `x0` is"),
        (None, torch.zeros(2, 2), "`x0` must have the graph of what made it"),
        (None, torch.zeros(2, requires_grad=True), r"`x0` must have shape \(n, \*\)"),
    ],
)
def test_what_would_spoil_the_gradient_is_refused_in_one_line(residual, x0, reason):
    loss = ScoreDistillationLoss(FrozenTeacher(small_mlp(), VP()), IID(), residual=residual)
    with pytest.raises(ValueError, match=reason) as refused:
        loss(torch.zeros(2, 2, requires_grad=True) if x0 is None else x0)
    assert "\n" not in str(refused.value)


def test_calls_draw_anew_ranks_differ_and_a_saved_loss_goes_on(monkeypatch):
    loss = ScoreDistillationLoss(FrozenTeacher(small_mlp(), VP()), CARV(2, LearnedProposal()))
    x0 = torch.zeros(2, 2, requires_grad=True)
    first = loss(x0).noised
    loss.advance()
    state = loss.state_dict()
    second = loss(x0).noised
    assert not torch.isin(first.t, second.t).any()
    again = ScoreDistillationLoss(loss.teacher, CARV(2, LearnedProposal()))
    again.load_state_dict(state)
    assert torch.equal(again(x0).noised.noise, second.noise)
    monkeypatch.setattr("lightning_vr.teachers.score_distillation_loss.rank", lambda: 1)
    again.load_state_dict(state)
    assert not torch.equal(again(x0).noised.noise, second.noise)


def test_numbers_for_loggers_are_norms_of_gradients_and_residuals():
    loss = ScoreDistillationLoss(FrozenTeacher(small_mlp(std=1.0), VP()), CARV(4))
    found = loss(torch.zeros(3, 2, requires_grad=True))
    numbers = found.numbers()
    assert float(numbers["gradient_norm"]) == pytest.approx(
        float(found.gradient.norm(dim=1).mean())
    )
    assert float(numbers["residual_norm"]) == pytest.approx(
        float(found.residual.norm(dim=1).mean())
    )
    assert float(numbers["loss"]) == found.loss.item()
    assert len(found.per_draw) == 12
    weight = loss.objective.weight(found.noised.t)
    torch.testing.assert_close(found.per_draw, weight * found.residual.square().mean(1))
    # the clean sample that a residual stands for
    torch.testing.assert_close(found.x0_hat, loss.teacher.denoise(found.noised))


def test_without_gradients_nothing_is_learned_and_no_graph_is_asked_for():
    loss = ScoreDistillationLoss(FrozenTeacher(small_mlp(), VP()), CARV(2, LearnedProposal()))
    with torch.no_grad():
        loss(torch.zeros(3, 2))
    assert float(loss.draws.proposal.observed.sum()) == 0


def test_a_direction_in_x0_space_has_its_own_unit():
    frozen = FrozenTeacher(small_mlp(std=1.0), VP())
    objective = frozen.objective(lightning_vr.UnitWeighting("x0"), (0.1, 0.9), "x0")
    x0 = torch.zeros(3, 2, requires_grad=True)
    residual = lambda noised: frozen.denoise(noised) - noised.x0  # noqa: E731
    found = distill(Clean(x0), residual, IID(), objective, generator(0))
    torch.testing.assert_close(found.gradient, found.residual)
    torch.testing.assert_close(found.x0_hat, frozen.denoise(found.noised))
    assert isinstance(objective.timesteps, Uniform)
    assert expand(found.noised.t, x0).shape == (3, 1)
