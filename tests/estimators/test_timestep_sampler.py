"""Times for any loop: unbiased, stratified, learned, and masks that complement each other."""

import pytest
import torch

from lightning_vr import LearnedProposal, TableProposal, TimestepSampler, Uniform, WeightProposal
from lightning_vr.core.rng import generator
from lightning_vr.process.timesteps import UniformSteps

DENSITY = Uniform(0.1, 1.0)


def learned():
    """A sampler that has seen gradients that grow with t."""
    sampler = TimestepSampler(DENSITY, LearnedProposal(bins=8))
    for i in range(30):
        t, _, _ = sampler.draw(64, generator("learn", i))
        sampler.observe(t, t**6)
        sampler.advance()
    return sampler


SAMPLERS = {
    "plain": lambda: TimestepSampler(DENSITY, strata=False),
    "strata": lambda: TimestepSampler(DENSITY),
    "learned": learned,
    "table": lambda: TimestepSampler(DENSITY, TableProposal([1, 2, 5]), antithetic=True),
    "weight": lambda: TimestepSampler(DENSITY, WeightProposal(), weight=lambda t: 1 / t),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_weighted_mean_over_masks_is_that_of_the_density(name, z_score):
    sampler = SAMPLERS[name]()
    found = []
    for i in range(300):
        source = generator(name, i)
        t, weight, _ = sampler.draw(8, source)
        mask = sampler.uniforms((8, 3), source) < t[:, None]
        found.append((weight * mask[:, 0] * mask[:, 1]).mean())
    mean = (1 - 0.1**3) / (3 * 0.9)  # E t² of Uniform(0.1, 1)
    assert abs(z_score(torch.stack(found), mean)) < 4


def test_each_stratum_has_one_draw_and_parts_of_a_step_share_them():
    t, _, _ = TimestepSampler(DENSITY).draw(16, generator("strata"))
    assert ((t - 0.1) / 0.9 * 16).long().sort().values.tolist() == list(range(16))


def test_what_is_learned_puts_times_where_gradients_are_large():
    sampler = learned()
    t, weight, _ = sampler.draw(4096, generator("drawn"))
    # q ∝ t³ over the floor: h at the ends, and E_q of the weight is 1
    assert float(t.mean()) > 0.7
    assert float(weight.max()) <= 10
    assert float(weight.mean()) == pytest.approx(1, abs=0.02)
    # of the gradient t³ the best q has (E t³)² in place of E t⁶, which is 0.49 of it
    second_moment = float(((weight * t**3) ** 2).mean())
    assert second_moment < 0.55 * (1 - 0.1**7) / (7 * 0.9)


def test_what_is_learned_is_in_the_state():
    again = TimestepSampler(DENSITY, LearnedProposal(bins=8))
    again.load_state_dict(learned().state_dict())
    one, other = (each.draw(8, generator("state")) for each in (again, learned()))
    assert torch.equal(one.t, other.t)


def test_masks_of_a_pair_are_complementary_at_half_and_have_one_rate():
    sampler = TimestepSampler(antithetic=True)
    t, _, _ = sampler.draw(6, generator("pairs"))
    assert torch.equal(t[::2], t[1::2])
    u = sampler.uniforms((6, 1000), generator("masks"))
    masks = u < 0.5
    assert torch.equal(masks[::2], ~masks[1::2])
    assert 0 < float(u.min()) < float(u.max()) < 1
    sparse = u < 0.3
    assert not (sparse[::2] & sparse[1::2]).any()
    assert sparse.float().mean(1).tolist() == pytest.approx([0.3] * 6, abs=0.06)


def test_bad_input_is_refused():
    pairs = TimestepSampler(antithetic=True)
    with pytest.raises(ValueError, match="`count` must be even with antithetic pairs, got 3"):
        pairs.draw(3, generator("odd"))
    with pytest.raises(ValueError, match=r"`shape\[0\]` must be even"):
        pairs.uniforms((3, 2), generator("odd"))
    with pytest.raises(ValueError, match="`count`"):
        pairs.draw(0, generator("none"))
    with pytest.raises(ValueError, match="`squared` must have one number for each"):
        pairs.observe(torch.rand(4), torch.rand(4, 2))
    with pytest.raises(ValueError, match="`proposal` must be positive"):
        TimestepSampler(proposal=TableProposal([0, 1]))
    with pytest.raises(ValueError, match="`bins` must be at most 4"):
        TimestepSampler(UniformSteps(4), LearnedProposal(bins=8))
