"""Guidance: one pass of a doubled batch equals two passes, and each option its formula."""

import math

import pytest
import torch

from lightning_vr.core.types import UNLABELLED
from lightning_vr.process.guidance import Guidance, rescaled
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import EDM, VP
from lightning_vr.process.solvers import Euler, Heun

COUNT = 5
GROUP = torch.tensor([0, 1, 2, 1, 0])


def cond(rows=COUNT, key=0.0):
    """A nested condition, as SDXL's."""
    row = torch.arange(rows, dtype=torch.float32)[:, None]
    return {"text": row + key, "added": {"pooled": row.expand(rows, 2) / 3 - key}}


NULL = {"text": torch.full((1, 1), 9.0), "added": {"pooled": torch.full((1, 2), -7.0)}}


class Network:
    """Any conditional denoiser of points in the plane; it keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, xt, t, group, cond):
        self.calls.append((xt, t, group, cond))
        group = torch.full((len(xt),), UNLABELLED) if group is None else group
        shift = torch.where(group == UNLABELLED, 0.7, 0.2 * group)[:, None]
        if cond is not None:
            shift = shift + 0.1 * cond["text"] + 0.05 * cond["added"]["pooled"]
        return torch.tanh(xt.flip(1) / (1 + t[:, None]) + shift)


def guided(network, group, cond, null_cond, *, scale=3.0, interval=None, rescale=0.0):
    return Guidance(network, EDM(), scale, interval, rescale, group, cond, null_cond)


CONDITIONS = {
    "labels": (GROUP, None, None),
    "condition": (None, cond(), cond(key=4.0)),
    "both": (GROUP, cond(), cond(key=4.0)),
}


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_the_doubled_pass_is_two_passes(kind, scale, source):
    group, given, null = CONDITIONS[kind]
    xt, t = torch.randn(COUNT, 2, generator=source), torch.full((COUNT,), 1.5)
    network = Network()
    found = guided(network, group, given, null, scale=scale)(xt, t)

    conditional, free = network(xt, t, group, given), network(xt, t, None, null)
    torch.testing.assert_close(found, free + scale * (conditional - free))
    # w of Ho and Salimans, equation 6: (1 + w) conditional - w unconditional
    w = scale - 1
    torch.testing.assert_close(found, (1 + w) * conditional - w * free)
    assert [len(call[0]) for call in network.calls] == [2 * COUNT, COUNT, COUNT]


@pytest.mark.parametrize("options", [{"scale": 1.0}, {"interval": (2.0, 9.0)}])
def test_where_guidance_does_not_act_the_network_is_called_with_the_condition_alone(options):
    network, xt, t = Network(), torch.ones(COUNT, 2), torch.full((COUNT,), 1.5)
    found = guided(network, GROUP, cond(), cond(key=4.0), **options)(xt, t)
    assert torch.equal(found, network(xt, t, GROUP, cond()))
    assert len(network.calls[0][0]) == COUNT


def test_guidance_acts_within_its_interval_of_noise_levels():
    levels, schedule = [20.0, 8.0, 4.0, 1.0, 0.3], VP()
    network = Network()
    sampler = Sampler(Euler(), grid=levels, guidance=2.0, guidance_interval=(1.0, 8.0))
    drawn = sampler.draw(network, schedule, torch.ones(COUNT, 2), group=GROUP)
    doubled = [len(xt) == 2 * COUNT for xt, *_ in network.calls]
    # above the first level and up to the second
    assert doubled == [False, True, True, False, False]
    assert drawn.evaluations == 5


def test_rescaling_is_equations_15_and_16_of_lin():
    conditional, guided = torch.randn(2, 4, 1, 3, 3).unbind()
    guided = 5 * guided + 1
    for i, found in enumerate(rescaled(guided, conditional, 0.7)):
        ratio = conditional[i].std() / guided[i].std()
        expected = 0.7 * (guided[i] * ratio) + 0.3 * guided[i]
        torch.testing.assert_close(found, expected)
    full = rescaled(guided, conditional, 1.0)
    torch.testing.assert_close(full.flatten(1).std(1), conditional.flatten(1).std(1))


def test_a_constant_sample_has_no_contrast_to_rescale():
    flat = torch.zeros(2, 3)
    assert torch.equal(rescaled(flat, torch.randn(2, 3), 0.5), flat)


def test_rescaling_takes_place_in_x0_space(source):
    network, xt, t = Network(), torch.randn(COUNT, 2, generator=source), torch.ones(COUNT)
    plain = guided(network, GROUP, None, None)(xt, t)
    found = guided(network, GROUP, None, None, rescale=0.4)(xt, t)
    torch.testing.assert_close(found, rescaled(plain, network(xt, t, GROUP, None), 0.4))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_one_row_of_a_condition_serves_all_samples(batch_size, source):
    noise = torch.randn(COUNT, 2, generator=source)
    sampler = Sampler(Heun(), 3, guidance=2.0)

    def draw(given, null, batch_size):
        return sampler.draw(
            Network(), EDM(), noise, group=GROUP, cond=given, null_cond=null, batch_size=batch_size
        )

    def repeated(given):
        return {
            k: repeated(v) if isinstance(v, dict) else v.expand(COUNT, -1) for k, v in given.items()
        }

    one = draw(cond(1, key=2.0), NULL, batch_size)
    all_rows = draw(repeated(cond(1, key=2.0)), NULL, COUNT)
    torch.testing.assert_close(one.x0, all_rows.x0)
    assert one.evaluations == all_rows.evaluations == 5


@pytest.mark.parametrize(
    ("null", "message"),
    [
        (None, r"`null_cond` must be given to leave out .* for guidance 2, got None: use"),
        ({"text": NULL["text"]}, r"`null_cond` must have the names of the condition, \['added', "),
        (
            NULL | {"added": {"size": torch.ones(1, 2)}},
            r"`null_cond` must have the names of the condition 'added', \['pooled'\], got \['size",
        ),
        (NULL | {"text": torch.ones(1, 4)}, r"`null_cond` must have the shape \(1,\) .* 'text'"),
        (NULL | {"text": "none"}, "`null_cond` must hold tensors or numbers, got 'none'"),
    ],
)
def test_a_null_condition_that_does_not_fit_is_refused(null, message):
    sampler = Sampler(steps=2, guidance=2.0)
    with pytest.raises(ValueError, match=message):
        sampler.draw(Network(), EDM(), torch.ones(COUNT, 2), cond=cond(), null_cond=null)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": -1.0}, "`guidance` must be at least 0, got -1.0"),
        ({"guidance": math.nan}, "`guidance` must be at least 0, got nan"),
        ({"guidance": math.inf}, "`guidance` must be finite, got inf"),
        ({"guidance_rescale": 1.5}, "`guidance_rescale` must be between 0 and 1, got 1.5"),
        ({"guidance_interval": (2.0, 1.0)}, r"`guidance_interval` must be .* got \(2.0, 1.0\)"),
        ({"guidance_interval": (-1.0, 1.0)}, "`guidance_interval` must be two noise levels 0 <="),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**options)
