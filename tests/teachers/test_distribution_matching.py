"""A one-step student that a frozen teacher trains, under a Trainer."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from scenes import fit, teacher, weights
from support.comparisons import assert_equal
from support.networks import small_mlp
from support.stops import StopAt, StoppedError
from torch import nn

from lightning_vr import (
    CARV,
    IID,
    VP,
    Clean,
    DistributionMatching,
    FrozenTeacher,
    LearnedProposal,
    TableProposal,
    WeightProposal,
)
from lightning_vr.core.rng import generator
from lightning_vr.core.types import StepPart
from lightning_vr.teachers.distillation import distill

pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
]


def matching(draws=None, **settings):
    settings = {"fake_steps": 2, "optimizer": lambda p: torch.optim.Adam(p, 0.01)} | settings
    module = DistributionMatching(teacher(prediction="x0"), draws=draws, **settings)
    with torch.no_grad():  # else the fake scores are the teacher's
        module.fake.network.project_out.bias.add_(0.5)
    return module


def samples(module, copies, key="samples"):
    """Six samples of the student, again and again, with their labels."""
    like = Clean(torch.empty(6, 2), torch.arange(6) % 2)
    x = module.generate(like, generator(key))
    return Clean(x.x0.detach().repeat(copies, 1).requires_grad_(), x.group.repeat(copies))


def by_hand(module, copies=6000):
    """Gradients by six samples of one draw each, from four calls of the networks."""
    clean, source = samples(module, copies), generator("hand")
    x, labels, null = clean.x0.detach(), clean.group, torch.full_like(clean.group, 2)
    t = 1e-5 + (1 - 1e-5) * (0.02 + 0.96 * torch.rand(len(x), generator=source))
    alpha, sigma = VP().alpha(t)[:, None], VP().sigma(t)[:, None]
    xt = alpha * x + sigma * torch.randn(x.shape, generator=source)

    real, fake = module.teacher.model.network, module.fake.network
    with torch.no_grad():
        text, without = real(xt, 1000 * t, labels), real(xt, 1000 * t, null)
        x0_real = without + 3.0 * (text - without)
        difference = fake(xt, 1000 * t, labels) - x0_real
        normalized = difference / (x - x0_real).abs().mean(dim=1, keepdim=True)
    return normalized.reshape(copies, 12)


@pytest.fixture(scope="module")
def hand_made():
    return by_hand(matching())


OPTIONS = {
    "IID": IID,
    "K = 4": lambda: CARV(4, scope="none"),
    "strata": lambda: CARV(4),
    "pairs": lambda: CARV(2, antithetic=True),
    "weight": lambda: CARV(2, WeightProposal()),
    "table": lambda: CARV(2, TableProposal([1.0, 3.0, 2.0, 0.5]), antithetic=True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_mean_gradient_is_that_of_a_plain_loop_whatever_the_draws(name, hand_made):
    module = matching(OPTIONS[name]())
    clean = samples(module, 1500)
    given = (module.residual, module.draws, module.objective, generator("z"))
    found = distill(clean, *given).gradient.reshape(1500, 12)
    error = (found.var(0) / 1500 + hand_made.var(0) / len(hand_made)).sqrt()
    assert float(((found.mean(0) - hand_made.mean(0)) / error).abs().max()) < 4.5


def test_without_the_normaliser_the_direction_is_the_difference_of_x0():
    module, plain = matching(), matching(normalizer=False)
    clean = samples(module, 1)
    noised = CARV(1)(clean, module.objective, generator("x0"))
    difference = plain.residual(noised)
    scale = (noised.x0 - module.teacher.denoise(noised)).abs().mean(dim=1, keepdim=True)
    assert torch.equal(module.residual(noised), difference / scale)


def test_an_untrained_teacher_gives_a_finite_direction_and_none_where_the_fake_agrees():
    untrained = FrozenTeacher(small_mlp(), VP(), "x0", sigma_data=2.0)  # its output is 0
    module = DistributionMatching(untrained, optimizer=torch.optim.SGD, fake_steps=1)
    noised = CARV(1)(Clean(torch.zeros(6, 2)), module.objective, generator("x0"))
    assert torch.equal(module.residual(noised), torch.zeros(6, 2))
    fit(module, length=2)
    with torch.no_grad():
        module.fake.network.project_out.bias.fill_(0.5)
    expected = torch.full((6, 2), 0.5 / (2.0 * 2.0**-23))
    torch.testing.assert_close(module.residual(noised), expected)


def test_the_student_makes_what_the_teacher_denoises_from_noise_alone():
    module = matching()
    noise = torch.randn(5, 2)
    group = torch.arange(5) % 2
    t = torch.ones(5)
    expected = module.teacher.model.denoise(VP().sigma(t)[:, None] * noise, t, group)
    torch.testing.assert_close(module.student(noise, group), expected)


def test_draws_have_their_own_iteration_whatever_the_number_of_fake_steps(tmp_path):
    for steps in (1, 3):
        module = matching(fake_steps=steps)
        fit(module, length=5, logger=CSVLogger(tmp_path / str(steps), name=""), log_every_n_steps=1)
        assert module.iteration == 5
        assert module.trainer.global_step == 5 * (steps + 1)
        header = (tmp_path / str(steps) / "version_0/metrics.csv").read_text().splitlines()[0]
        for name in ("loss", "fake_loss", "gradient_norm", "residual_norm"):
            assert f"train/{name}" in header
    fresh = matching()
    for part in ("student", "fake"):
        assert not torch.equal(weights(getattr(module, part)), weights(getattr(fresh, part)))
    assert torch.equal(weights_of_teacher(module), weights_of_teacher(fresh))
    assert module.sample(4, group=[0, 1, 0, 1]).shape == (4, 2)
    assert torch.equal(module.sample(4, seed=3), module.sample(4, seed=3))
    assert not torch.equal(module.sample(4, seed=3), module.sample(4, seed=4))


def weights_of_teacher(module):
    return weights(module.teacher.model)


def test_a_student_of_ones_own_and_a_learned_proposal_train_together():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2))

        def forward(self, noise, group, cond):
            return noise + self.shift

    module = matching(CARV(2, LearnedProposal(bins=4)), student=Student(), fake_steps=1)
    fit(module, length=6)
    assert float(module.student.shift.detach().abs().min()) > 0
    assert float(module.draws.proposal.table[2].sum()) == 6 * 2


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_killed_run_resumes_bitwise(tmp_path, hook):
    def run(*callbacks, ckpt_path=None):
        module = matching(CARV(2, LearnedProposal(bins=2)))
        seed = 5 if ckpt_path is None else 6
        trainer = fit(module, *callbacks, seed=seed, ckpt_path=ckpt_path, length=8)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return torch.load(tmp_path / "end.ckpt", weights_only=False)

    expected = run()
    with pytest.raises(StoppedError):
        run(StopAt(hook, 4, tmp_path / "stopped.ckpt"))
    found = run(ckpt_path=tmp_path / "stopped.ckpt")
    for part in ("state_dict", "optimizer_states", "lightning_vr"):
        assert_equal(found[part], expected[part], part)


def test_a_checkpoint_holds_student_and_fake_model_and_no_teacher(tmp_path):
    module = matching()
    trainer = fit(module, length=2)
    trainer.save_checkpoint(tmp_path / "matching.ckpt")
    found = torch.load(tmp_path / "matching.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in found["state_dict"]} == {"student", "fake", "draws"}
    with pytest.raises(ValueError, match="`teacher` of the module in"):
        DistributionMatching.load_from_checkpoint(tmp_path / "matching.ckpt")
    again = DistributionMatching.load_from_checkpoint(
        tmp_path / "matching.ckpt", teacher=teacher(prediction="x0"), optimizer=torch.optim.Adam
    )
    assert torch.equal(again.sample(4, seed=1), module.sample(4, seed=1))


class Save(Callback):
    """Writes what each rank has at the end to a file of its own."""

    def __init__(self, folder):
        self.folder, self.labels = folder, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.labels.append(batch["label"])

    def on_train_end(self, trainer, module):
        found = {"weights": weights(module), "labels": torch.stack(self.labels)}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def alone(monkeypatch, labels):
    """Two steps in one process, with the draws and labels of both ranks."""
    module = matching(CARV(2), optimizer=lambda p: torch.optim.SGD(p, 1e-3))
    module.seed = 5
    ranks = range(2)
    for step in range(2):
        likes = [Clean(torch.empty(len(x[step]), 2), x[step]) for x in labels]

        def averaged(optimizer, loss_of, likes=likes):
            optimizer.zero_grad()
            for rank in ranks:
                monkeypatch.setattr("lightning_vr.core.keyed_module.rank", lambda rank=rank: rank)
                module._part = lambda *key, rank=rank: StepPart(
                    rank, 2, generator(5, *key, module.iteration)
                )
                (0.5 * loss_of(likes[rank])).backward()
            optimizer.step()

        student, fake = module.configure_optimizers()
        for i in range(2):
            averaged(fake, lambda like, i=i: module._fake_estimate(like, i).loss)

        def student_loss(like):
            source = module.generator("student", module.iteration)
            x = module.generate(like, source)
            given = (module.draws, module.objective, source, module._part("strata"))
            return distill(x, module.residual, *given).loss

        averaged(student, student_loss)
        module.iteration += 1
    return weights(module)


def test_two_ranks_train_a_student_as_one_process_does(tmp_path, monkeypatch):
    module = matching(CARV(2), optimizer=lambda p: torch.optim.SGD(p, 1e-3))
    strategy = "ddp_fork_find_unused_parameters_true"
    fit(module, Save(tmp_path), strategy=strategy, devices=2, length=8, batch_size=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = alone(monkeypatch, [each["labels"] for each in found])
    for each in found:
        torch.testing.assert_close(each["weights"], expected, rtol=1e-5, atol=1e-6)


def test_ranks_that_would_wait_for_gradients_are_refused_in_one_line():
    with pytest.raises(Exception, match="`strategy` must look for parameters"):
        fit(matching(), strategy="ddp_fork", devices=2, length=4)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: matching(CARV()), "`resamples` must be a number in a DistributionMatching"),
        (lambda: matching(CARV(2, TableProposal([0, 1]))), "`proposal` must be positive"),
        (lambda: matching(fake_steps=0), "`fake_steps` must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_built(build, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        build()
    assert "\n" not in str(refused.value)
