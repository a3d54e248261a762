"""A scene that a frozen teacher trains, under a Trainer."""

import logging
from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from scenes import VIEWS, Scene, fit, scene, teacher, weights
from support.comparisons import assert_equal
from support.stops import StopAt, StoppedError

from lightning_vr import CARV, Clean, OrbitViews, ScoreDistillation, TableProposal
from lightning_vr.core.rng import generator, seed_global_rng
from lightning_vr.core.types import StepPart
from lightning_vr.teachers.distillation import distill
from lightning_vr.teachers.noisy_distillation import NoisyDistillation
from lightning_vr.training.resamples_pilot import ResamplesPilot
from lightning_vr.variance.gradient_measurement import GradientMeasurement

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")


def test_a_step_is_one_of_the_bare_loss_on_the_views_of_the_step():
    module = scene(CARV(4), optimizer=lambda p: torch.optim.SGD(p, 0.1))
    other = scene(CARV(4))
    fit(module, max_steps=1)
    other.seed = 5
    clean = other.clean(VIEWS.draw(other.generator("views", 0, 0)))
    part = StepPart(0, 1, generator(5, "strata", 0))
    source = other.generator("train", 0, 0)
    found = distill(clean, other.teacher.noise_residual, CARV(4), other.objective, source, part)
    found.loss.backward()
    for parameter in other.parameters():
        parameter.data -= 0.1 * parameter.grad
    torch.testing.assert_close(weights(module), weights(other))
    assert not torch.equal(weights(module), weights(scene()))
    torch.testing.assert_close(module.estimate.gradient, found.gradient)


def test_strata_run_over_accumulated_batches_and_proposals_learn():
    seen = []

    class Seen(Scene):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append(self.objective.timesteps.cdf(self.estimate.noised.t))
            return loss

    fit(Seen(teacher(), draws=CARV(1), views=VIEWS), accumulate_grad_batches=3, length=6)
    for step in (seen[:3], seen[3:]):
        strata = (12 * torch.cat(step)).long()
        assert sorted(strata.tolist()) == list(range(12))
    module = scene()
    fit(module)
    table = module.draws.proposal.table
    assert float(table[2].sum()) == 24 * 4 * 4
    assert float(table[0].max()) > 0


def test_a_checkpoint_holds_no_weight_of_the_teacher_which_is_given_again(tmp_path):
    module = scene(width=16)
    trainer = fit(module)
    trainer.save_checkpoint(tmp_path / "scene.ckpt")
    found = torch.load(tmp_path / "scene.ckpt", weights_only=True)
    names = {name for name in found["state_dict"] if "extra_state" not in name}
    assert names == {f"scene.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")}
    with pytest.raises(ValueError, match=r"`teacher` of the module in .* must be given again"):
        ScoreDistillation.load_from_checkpoint(tmp_path / "scene.ckpt")
    again = ScoreDistillation.load_from_checkpoint(
        tmp_path / "scene.ckpt", teacher=teacher(), views=VIEWS, optimizer=torch.optim.Adam
    )
    assert isinstance(again, Scene)
    assert torch.equal(weights(again), weights(module))
    assert torch.equal(again.draws.proposal.table, module.draws.proposal.table)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_killed_run_resumes_bitwise(tmp_path, hook):
    def run(*callbacks, ckpt_path=None):
        module = scene(dropout=0.2)
        seed = 5 if ckpt_path is None else 6
        trainer = fit(module, *callbacks, seed=seed, ckpt_path=ckpt_path, accumulate_grad_batches=2)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return torch.load(tmp_path / "end.ckpt", weights_only=False)

    expected = run()
    with pytest.raises(StoppedError):
        run(StopAt(hook, 7, tmp_path / "stopped.ckpt"))
    found = run(ckpt_path=tmp_path / "stopped.ckpt")
    for part in ("state_dict", "optimizer_states", "lightning_vr"):
        assert_equal(found[part], expected[part], part)


def test_loggers_get_norms_of_gradients_and_residuals(tmp_path):
    module = scene()
    fit(module, logger=CSVLogger(tmp_path, name=""), log_every_n_steps=1, max_steps=2)
    header, *rows = (tmp_path / "version_0/metrics.csv").read_text().splitlines()
    for name in ("loss", "gradient_norm", "residual_norm", "largest_weight"):
        assert f"train/{name}" in header
    assert len(rows) == 2
    assert len(module.estimate.per_draw) == 16


def test_a_pilot_measures_render_encode_and_denoise_and_chooses_k(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lightning_vr.training.resamples_pilot._LEAST_GAIN", 1.0)  # however cheap
    module = scene(CARV(max_resamples=8))
    with caplog.at_level(logging.INFO):
        fit(module, logger=CSVLogger(tmp_path, name=""), log_every_n_steps=1)
    assert "CARV: K = " in caplog.text
    pilot = module.draws.pilot
    assert pilot["within"] > 0
    header = (tmp_path / "version_0/metrics.csv").read_text().splitlines()[0]
    for name in ("render_s", "encode_s", "denoise_s", "between_views", "within_views", "resamples"):
        assert f"pilot/{name}" in header


def test_a_dear_renderer_gets_many_draws_and_a_free_one_gets_one(monkeypatch):
    for upstream, expected in ((0.01, 1), (50.0, 8)):
        monkeypatch.setattr(ResamplesPilot, "_seconds", lambda *_: (upstream, 1.0))  # noqa: B023
        monkeypatch.setattr(ResamplesPilot, "_pass_seconds", lambda *_: (0.0, 1.0))
        monkeypatch.setattr(ResamplesPilot, "_components", lambda _: (1.0, 3.0))
        module = scene(CARV(max_resamples=8))
        monkeypatch.setattr(
            "lightning_vr.teachers.distillation_pilot.DistillationPilot._seconds",
            ResamplesPilot._seconds,
        )
        monkeypatch.setattr(
            "lightning_vr.teachers.distillation_pilot.DistillationPilot._costs", {}, raising=False
        )
        fit(module)
        assert module.draws.draws_per_sample == expected


def test_the_components_of_a_pilot_are_those_of_plain_repetitions():
    """V_B between pairs of views and V_W within a view, of gradients by the scene."""
    module = scene(CARV(2, scope="none"), optimizer=lambda p: torch.optim.SGD(p, 0.0))
    module.seed = 1
    clean = lambda i: module.clean(VIEWS.draw(generator("views", i)))  # noqa: E731
    parameters = list(module.parameters())

    def gradient(clean, key, draws):
        source = generator("draws", key)
        found = distill(clean, module.residual, draws, module.objective, source)
        parts = torch.autograd.grad(found.loss, parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts]).double()

    one = CARV(1, scope="none")
    within = []
    for i in range(15):
        views = clean(i)
        within.append(torch.stack([gradient(views, (i, j), one) for j in range(16)]).var(0).sum())
    expected = 4 * float(torch.stack(within).mean())

    units = [clean(i) for i in range(60)]
    loss = NoisyDistillation(module)
    source = partial(generator, "measure")
    found = GradientMeasurement(loss, source, [0] * len(parameters)).by_differences(units, 0)
    measured = 2 * float((found.timestep + found.noise)[0])
    assert measured == pytest.approx(expected, rel=0.25)


def test_antipodal_views_are_opposite_and_uniform_on_the_sphere():
    views = OrbitViews(2000, elevation=(-90.0, 90.0), antipodal=True)
    found = views.draw(generator("views"))

    def directions(azimuth, elevation):
        flat = elevation.cos()
        return torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()], dim=1)

    x = directions(found.azimuth.double(), found.elevation.double())
    torch.testing.assert_close(x[::2], -x[1::2], rtol=0, atol=1e-5)
    second_moment = x[::2].T @ x[::2] / 1000
    torch.testing.assert_close(second_moment, torch.eye(3).double() / 3, rtol=0, atol=0.04)


def test_antipodal_pairs_of_views_leave_the_mean_gradient(z_score):
    module = scene()

    def means(views):
        gradients = []
        for i in range(300):
            batch = views.draw(generator("mean", i))
            (x,) = torch.autograd.grad(
                module.clean(batch).x0.sum() / views.count, weights_of(module)
            )
            gradients.append(x.flatten())
        return torch.stack(gradients).double()

    pairs, single = means(OrbitViews(2, antipodal=True)), means(OrbitViews(2))
    error = ((pairs.var(0) + single.var(0)) / 300).sqrt()
    z = (pairs.mean(0) - single.mean(0)) / error.clamp(min=1e-12)
    assert float(z.abs().max()) < 4.5
    assert float(pairs.var(0).sum()) < float(single.var(0).sum())


def weights_of(module):
    return module.scene[0].weight


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: scene(CARV(2, TableProposal([0, 1]))), "`proposal` must be positive"),
        (lambda: OrbitViews(3, antipodal=True), "`count` must be even"),
        (lambda: OrbitViews(1, elevation=(50, 10)), "`elevation` must be two angles"),
        (lambda: scene(time_range=(0.5, 0.5)), "`time_range` must be"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_built(build, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        build()
    assert "\n" not in str(refused.value)


def test_a_render_without_a_graph_is_refused_and_nothing_rendered_is_said():
    class Detached(Scene):
        def render(self, batch):
            clean = super().render(batch)
            return Clean(clean.x0.detach(), clean.group)

    with pytest.raises(ValueError, match="`x0` must have the graph of what made it"):
        fit(Detached(teacher(), views=VIEWS), max_steps=1)
    with pytest.raises(NotImplementedError, match=r"`ScoreDistillation.render` must be overridden"):
        ScoreDistillation(teacher()).render(None)


def test_a_step_that_is_not_finite_is_named_or_left_out():
    class Broken(Scene):
        def render(self, batch):
            clean = super().render(batch)
            scale = torch.nan if self.global_step == 1 else 1.0
            return Clean(clean.x0 * scale, clean.group)

    with pytest.raises(ValueError, match="Optimizer step 1 met a number that is not finite"):
        fit(Broken(teacher(), views=VIEWS), max_steps=3)
    module = Broken(teacher(), views=VIEWS, on_nonfinite="skip")
    with pytest.warns(UserWarning, match="The step is left out"), seed_global_rng(generator(0)):
        fit(module, max_steps=2, length=4)
    assert bool(weights(module).isfinite().all())
