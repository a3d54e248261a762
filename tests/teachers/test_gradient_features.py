"""Gradients of single samples as features, and the scores made of them."""

import pytest
import torch
from scipy.stats import spearmanr
from support.networks import small_mlp, small_unet
from support.points import normal_points, two_classes

from lightning_vr import (
    CARV,
    IID,
    VP,
    Clean,
    Diffusion,
    FrozenTeacher,
    GradientFeatures,
    LearnedProposal,
    TableProposal,
    WeightProposal,
)
from lightning_vr.core.rng import generator
from lightning_vr.process.timesteps import Uniform
from lightning_vr.teachers import (
    cosine_scores,
    gradient_features,
    linear_datamodeling_score,
    random_projection,
    trak_scores,
)
from lightning_vr.teachers.random_projection import RandomProjection

POINTS = Clean(normal_points(5, "features"), two_classes(5))


def model(prediction="epsilon", **settings):
    network = small_mlp(4, std=1.0, num_class_embeds=3)
    settings = {"num_classes": 2, "timesteps": Uniform(0.05, 0.95)} | settings
    return Diffusion(network, VP(), prediction, **settings)


def by_hand(model, noised, samples, value):
    """The gradient of each sample's mean over its draws, one backward pass each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for losses in value.reshape(samples, -1).mean(dim=1):
        parts = torch.autograd.grad(losses, parameters, retain_graph=True)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


@pytest.mark.parametrize("output", ["loss", "square", "own"])
def test_features_are_gradients_of_each_samples_mean_over_its_draws(output):
    own, draws = model("v"), CARV(4, WeightProposal(), antithetic=True)
    x = lambda model, noised: model.predict(noised.xt, noised)  # noqa: E731
    first = lambda model, noised: x(model, noised)[:, 0]  # noqa: E731
    given = first if output == "own" else output
    settings = {"projection": None, "output": given, "shared": False, "seed": 3}
    features = GradientFeatures(own, draws, **settings)(POINTS)
    noised = draws(POINTS, own.objective, generator(3, "features", "train", 0))
    predicted = x(own, noised)
    if output == "loss":
        alpha, sigma = noised.alpha[:, None], noised.sigma[:, None]
        error = (predicted - (alpha * noised.noise - sigma * noised.x0)).square().mean(dim=1)
        value = noised.weight * own.objective.weight(noised.t) * error
    else:
        value = noised.weight * (predicted[:, 0] if output == "own" else predicted.square().mean(1))
    expected = by_hand(own, noised, 5, value)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_shared_draws_are_the_same_for_queries_and_training_samples_and_others_are_not():
    shared = GradientFeatures(model(), CARV(4), projection=None)
    doubled = Clean(POINTS.x0[[0, 0]], POINTS.group[[0, 0]])
    found = shared(doubled)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(shared(doubled, "query"), found)
    own = GradientFeatures(model(), CARV(4), projection=None, shared=False)
    first, second = own(doubled)
    assert not torch.allclose(first, second, rtol=0.01)
    assert not torch.allclose(own(doubled, "query"), own(doubled), rtol=0.01)
    assert torch.equal(own(doubled), own(doubled))


OPTIONS = {
    "IID": IID,
    "strata": lambda: CARV(4),
    "pairs": lambda: CARV(2, antithetic=True),
    "weight": lambda: CARV(2, WeightProposal()),
    "learned": lambda: CARV(4, LearnedProposal(bins=4), antithetic=True),
    "table": lambda: CARV(2, TableProposal([1.0, 3.0, 2.0, 0.5])),
}


@pytest.fixture(scope="module")
def plain():
    features = GradientFeatures(model(), IID(), projection=8, shared=False)
    return features(Clean(POINTS.x0[:1].repeat(20_000, 1), POINTS.group[:1].repeat(20_000)))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_mean_of_features_does_not_depend_on_the_draws(name, plain):
    features = GradientFeatures(model(), OPTIONS[name](), projection=8, shared=False)
    if name == "learned":
        features.learn(POINTS, 64)
        assert float(features.draws.proposal.table[1].min()) > 8
    count = 2000
    found = features(Clean(POINTS.x0[:1].repeat(count, 1), POINTS.group[:1].repeat(count)), "z")
    error = (found.var(0) / count + plain.var(0) / len(plain)).sqrt()
    assert float(((found.mean(0) - plain.mean(0)) / error).abs().max()) < 4.5


def test_a_proposal_learns_where_gradients_are_large_before_features_are_computed():
    own = model()
    features = GradientFeatures(own, CARV(4, LearnedProposal(bins=4, floor=0.01)), projection=None)
    features.learn([POINTS, POINTS], 200)
    single = GradientFeatures(own, IID(), projection=None, shared=False, seed=1)
    points = POINTS.rows(torch.arange(5).repeat(800))
    norms = single(points).norm(dim=1)
    t = IID()(points, own.objective, generator(1, "features", "train", 0)).t
    bins = (4 * own.objective.timesteps.cdf(t)).long().clamp(max=3)
    oracle = torch.stack([norms[bins == i].square().mean().sqrt() for i in range(4)]).double()
    h = features.draws.proposal(own.objective, torch.device("cpu"))
    found = h((torch.arange(4).double() + 0.5) / 4)
    torch.testing.assert_close(found, 4 * oracle / oracle.sum(), rtol=0.1, atol=0.02)
    assert float(found.max() / found.min()) > 1.3


def test_chunks_of_gradients_and_of_the_projection_change_nothing(monkeypatch):
    whole = GradientFeatures(model(), CARV(4), projection=16)(POINTS)
    monkeypatch.setattr(gradient_features, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(random_projection, "_KEPT", 0)
    found = GradientFeatures(model(), CARV(4), projection=16)(
        [POINTS.rows([0, 1, 2]), POINTS.rows([3, 4])]
    )
    torch.testing.assert_close(found, whole)


def test_projected_inner_products_have_the_mean_of_those_of_gradients(z_score):
    gradients = [normal_points(2, "first", 12), normal_points(2, "second", 18)]
    whole = torch.cat(gradients, dim=1)
    found = []
    for seed in range(500):
        projected = RandomProjection(30, 6, seed)(gradients)
        found.append(projected @ projected.T)
    found = torch.stack(found).double()
    expected = whole.double() @ whole.double().T
    for i, j in ((0, 0), (0, 1), (1, 1)):
        assert abs(z_score(found[:, i, j], float(expected[i, j]))) < 4.5


def test_blocks_of_a_projection_are_one_matrix(monkeypatch):
    monkeypatch.setattr(random_projection, "_BLOCK", 20)
    projection = RandomProjection(30, 6, 0)
    matrix = projection([torch.eye(30)])
    assert set((matrix * 6**0.5).round(decimals=4).unique().tolist()) == {-1.0, 1.0}
    x = normal_points(4, "rows", 30)
    torch.testing.assert_close(projection([x[:, :7], x[:, 7:]]), x @ matrix)


def test_the_loss_of_one_sample_for_other_libraries_has_the_features_as_gradient():
    """As dattri 0.3 calls it: in a vmap that would draw anew for each sample."""
    own = model()
    features = GradientFeatures(own, CARV(4, antithetic=True), projection=None)
    loss = features.loss_function((2,))
    parameters = {name: p.detach() for name, p in own.named_parameters()}
    one = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")
    found = one(parameters, (POINTS.x0, POINTS.group))
    flat = torch.cat([x.flatten(1) for x in found.values()], dim=1)
    torch.testing.assert_close(flat, features(POINTS), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(2,\), got \(4,\): call loss_function\(\(4,\)\)"):
        loss(parameters, torch.zeros(4))


def test_a_network_of_images_and_a_frozen_teacher_have_features():
    teacher = FrozenTeacher(small_unet(), VP())
    features = GradientFeatures(teacher, CARV(2), projection=32)
    found = features([torch.randn(2, 1, 8, 8), torch.randn(1, 1, 8, 8)])
    assert found.shape == (3, 32)
    assert bool(found.isfinite().all())
    assert float(found.norm(dim=1).min()) > 0
    assert all(p.grad is None for p in teacher.model.parameters())


def test_cosines_and_traks_scores_are_their_formulas():
    query, train = normal_points(3, "query", 4), normal_points(6, "train", 4)
    expected = torch.nn.functional.cosine_similarity(query[:, None], train[None], dim=2)
    torch.testing.assert_close(cosine_scores(query, train), expected.double())
    phi = train.double()
    ridge = 0.1 * torch.trace(phi.T @ phi) / 4 * torch.eye(4).double()
    expected = query.double() @ torch.linalg.inv(phi.T @ phi + ridge) @ phi.T
    torch.testing.assert_close(trak_scores(query, train, damping=0.1), expected)


def test_the_linear_datamodeling_score_is_the_rank_correlation_over_subsets():
    scores = normal_points(2, "scores", 7).double()
    masks = torch.rand(9, 7, generator=generator("masks")) < 0.5
    outputs = normal_points(9, "outputs", 2)
    found = linear_datamodeling_score(scores, masks, outputs)
    for i in range(2):
        predicted = masks.double() @ scores[i]
        expected = spearmanr(predicted.numpy(), outputs[:, i].numpy()).statistic
        assert float(found[i]) == pytest.approx(expected, abs=1e-6)
    perfect = masks.double() @ scores.T
    torch.testing.assert_close(linear_datamodeling_score(scores, masks, perfect**3), torch.ones(2))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: GradientFeatures(model(), projection=10**6), "`projection` must be at most"),
        (lambda: GradientFeatures(model(), CARV()), "`resamples` must be a number"),
        (lambda: GradientFeatures(model(), output="logit"), "`output` must be"),
        (
            lambda: GradientFeatures(model(), projection=8, output=lambda *_: torch.ones(()))(
                POINTS
            ),
            "`output` must return one number for each",
        ),
        (
            lambda: GradientFeatures(model(), CARV(2), projection=8).learn(POINTS),
            "must have a LearnedProposal",
        ),
        (lambda: cosine_scores(torch.ones(1, 2), torch.ones(1, 3)), "must be features"),
        (
            lambda: linear_datamodeling_score(torch.ones(1, 2), torch.ones(3, 3), torch.ones(3, 1)),
            "`masks` and `outputs` must have the shapes",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(call, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        call()
    assert "\n" not in str(refused.value)
