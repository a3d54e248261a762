"""Runs with a learned variance: together with STF, CARV, label dropout and checkpoints."""

import pytest
import torch
from support.diffusers_networks import WITH_VARIANCE, condition, tiny
from support.gaussian_reverse import TwoHalves, scheduler
from support.points import Points, normal_points, two_classes
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader

from lightning_vr import (
    CARV,
    DDPM,
    STF,
    Clean,
    Diffusion,
    DiffusionModule,
    GradientVariance,
    LearnedProposal,
    LearnedVariance,
    Sampler,
    VariationalBound,
)


def module(kind=DiffusionModule, **options):
    settings = {
        "schedule": scheduler(20),
        "prediction": "epsilon",
        "num_classes": 2,
        "label_dropout": 0.2,
        "variance": LearnedVariance(weight=0.01),
    }
    return kind(TwoHalves(3), **(settings | options))


def loader():
    return DataLoader(Points(normal_points(32, 5), two_classes(32)), batch_size=8)


def test_a_run_with_every_other_estimator_trains_both_halves_and_its_checkpoint_samples(tmp_path):
    own = module(target=STF("all"), draws=CARV(4, LearnedProposal("bound", bins=4), chunk_size=10))
    before = {name: x.clone() for name, x in own.network.named_parameters()}
    trainer = quiet_trainer(GradientVariance(every_n_steps=1), max_steps=4)
    trainer.fit(own, loader(), loader())
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    for name in ("mean.weight", "variance.weight"):
        assert not torch.equal(own.network.get_parameter(name), before[name])
    assert float(own.draws.proposal.table[1].sum()) > 0

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = DiffusionModule.load_from_checkpoint(tmp_path / "last.ckpt", network=TwoHalves(3))
    assert again.variance == own.variance
    assert again.sampler == own.sampler
    sampler = Sampler(DDPM(), steps=4, guidance=2.0)
    found = [
        each.sample(6, group=[0, 1] * 3, shape=(2,), sampler=sampler, seed=1, batch_size=4)
        for each in (own, again)
    ]
    assert torch.equal(*found)
    fixed = Sampler(DDPM("beta"), steps=4, guidance=2.0)
    assert not torch.equal(own.sample(6, group=[0, 1] * 3, sampler=fixed, seed=1), found[0])
    assert bool(torch.isfinite(found[0]).all())


@pytest.mark.parametrize("kind", WITH_VARIANCE)
def test_transformers_of_twice_the_channels_learn_and_use_their_variance(kind, source):
    class Conditional(Diffusion):
        def encode(self, batch):
            group = torch.arange(len(batch)) if kind == "DiT" else None
            return Clean(batch, group, condition(kind, len(batch)))

    labels = {"num_classes": 3} if kind == "DiT" else {}
    own = Conditional(
        tiny(kind), scheduler(20), "epsilon", variance=LearnedVariance(levels=256), **labels
    )
    x0 = torch.randint(256, (3, 2, 8, 8), generator=source) / 127.5 - 1
    own.loss(x0, source).loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in own.parameters())
    cond = condition(kind, 3)
    bits = VariationalBound(3, levels=256, clip_sample=True).bits_per_dimension(
        own.eval().reverse_estimate, own.schedule, x0, source, cond=cond
    )
    assert all(bool(each.isfinite().all()) and len(each) == 3 for each in bits.values())
    sampler = Sampler(DDPM(clip_sample=True), steps=2)
    group = [0, 1] if labels else None
    samples = own.sample(2, group=group, cond=condition(kind, 2), sampler=sampler)
    assert samples.shape == (2, 2, 8, 8)


def test_a_fixed_variance_samples_networks_without_a_second_half_and_predicts_of_ones_own(source):
    class Zero(Diffusion):
        def predict(self, x, noised):
            return torch.zeros_like(x)

    own = Zero(TwoHalves(), scheduler(20), "epsilon")
    found = own.reverse_estimate(torch.ones(2, 2), torch.full((2,), 3.0))
    assert found.v is None
    torch.testing.assert_close(found.x0, torch.ones(2, 2) / own.schedule.alpha(torch.tensor(3.0)))
    assert own.sample(2, shape=(2,), sampler=Sampler(DDPM("beta"), steps=2)).shape == (2, 2)


def test_a_variance_that_is_not_finite_is_traced_to_its_sample():
    class Broken(TwoHalves):
        def forward(self, x, t, class_labels=None):
            far = x.abs().amax(dim=1, keepdim=True) > 100
            mean, v = super().forward(x, t).chunk(2, dim=1)
            return torch.cat([mean, v.masked_fill(far, torch.nan)], dim=1)

    points = normal_points(8, 5)
    points[5] = 1e6
    own = DiffusionModule(Broken(), scheduler(20), "epsilon", variance=LearnedVariance())
    data = DataLoader(Points(points), batch_size=8)
    with pytest.raises(ValueError, match=r"sample 5, noise level .* has a loss that is not"):
        quiet_trainer(max_steps=1, num_sanity_val_steps=0).fit(own, data, data)
