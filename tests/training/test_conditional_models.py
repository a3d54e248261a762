"""Conditions on their way from data to the network: in training, sampling and guidance."""

import pytest
import torch
from support.conditions import CaptionedPoints, CaptionModule, captioned, embedded
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader

from lightning_vr import CARV, STF, Clean, Diffusion, GradientVariance, Sampler, Uniform
from lightning_vr.core.rng import generator

FAST = Sampler(steps=2)
BATCH = next(iter(DataLoader(CaptionedPoints(8, classes=2), batch_size=8)))


def loader(**options):
    return DataLoader(CaptionedPoints(**options), batch_size=8)


def gradient(model, batch=BATCH):
    model.zero_grad()
    model.loss(batch, generator(0)).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.network.parameters() if p.grad is not None])


@pytest.mark.parametrize("draws", [CARV(4), CARV(4, chunk_size=5)], ids=["at once", "in chunks"])
def test_repeats_and_chunks_carry_every_row_of_the_condition(draws):
    model = captioned(draws=draws)
    noised = model.loss(BATCH, generator(0)).noised
    expected = embedded(BATCH["text"])
    assert torch.equal(noised.cond["text"], expected["text"].repeat_interleave(4, dim=0))
    size = expected["added"]["size"].repeat_interleave(4, dim=0)
    assert torch.equal(noised.cond["added"]["size"], size)


def test_the_gradient_in_chunks_is_that_of_the_whole():
    whole, chunks = captioned(draws=CARV(4)), captioned(draws=CARV(4, chunk_size=5))
    torch.testing.assert_close(gradient(chunks), gradient(whole))


def test_one_row_for_all_samples_trains_as_one_for_each():
    class OneRow(CaptionModule):
        def encode(self, batch):
            return Clean(batch["x0"], cond=embedded(["left"]))

    each, one = captioned(), captioned()
    one.__class__ = OneRow
    batch = BATCH | {"text": ["left"] * 8}
    torch.testing.assert_close(gradient(one, batch), gradient(each, batch))


def test_a_run_with_conditions_measures_gradient_variance_and_validates():
    watch = GradientVariance(every_n_steps=1)
    trainer = quiet_trainer(watch, max_steps=2)
    trainer.fit(captioned(draws=CARV(2)), loader(), loader())
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_dropped_conditions_become_what_stands_for_none_and_the_rest_stays():
    model = captioned(cond_dropout=0.5, null_cond="zeros")
    many = next(iter(DataLoader(CaptionedPoints(400), batch_size=400)))
    found = model.loss(many, generator(0)).noised.cond["added"]["size"]
    whole = embedded(many["text"])["added"]["size"]
    kept = found == whole
    assert (found[~kept] == 0).all()
    # a caption of number 0 is its own null
    assert abs(float((~kept).float().mean()) - 0.375) < 4 * (0.375 * 0.625 / 400) ** 0.5
    model.eval()
    assert torch.equal(model.loss(many, generator(0)).noised.cond["added"]["size"], whole)


def test_what_a_model_encodes_as_no_condition_stands_for_it():
    class Prompted(CaptionModule):
        def encode_null(self):
            return embedded(["right"])

    model = captioned(cond_dropout=1.0, null_cond="zeros")
    model.__class__, model.null_cond = Prompted, None
    found = model.loss(BATCH, generator(0)).noised.cond
    assert torch.equal(found["text"], embedded(["right"] * 8)["text"])
    # and samples that no condition is asked for
    unconditional = model.sample(3, seed=0, sampler=FAST)
    asked = model.sample(3, cond=embedded(["right"] * 3), seed=0, sampler=FAST)
    assert torch.equal(unconditional, asked)


def test_stf_takes_all_references_for_samples_without_their_condition():
    class Numbered(CaptionModule):
        def encode(self, batch):
            caption = batch["index"] % 4
            return Clean(batch["x0"], cond=embedded(batch["text"]), cond_group=caption)

    ess = []
    for dropout in (0.0, 1.0):
        far = {"timesteps": Uniform(20.0, 80.0), "target": STF("batch")}
        model = captioned(cond_dropout=dropout, null_cond="zeros", **far)
        model.__class__ = Numbered
        ess.append(model.loss(BATCH, generator(0)).target.ess)
    assert (ess[0] <= 2.001).all()  # two of the eight have the same caption
    assert (ess[1] > 6).all()


@pytest.mark.parametrize("num_classes", [None, 2])
def test_guidance_leaves_out_the_condition_and_the_label(num_classes):
    dropout = {"cond_dropout": 0.1, "null_cond": "zeros"}
    dropout |= {} if num_classes is None else {"label_dropout": 0.1}
    model = captioned(num_classes, **dropout)
    model.sample_shape = (2,)
    group = None if num_classes is None else [0, 1, 1]
    cond = embedded(["down", "left", "right"])
    asked = {"group": group, "cond": cond, "seed": 0}

    # of a network that is affine in what it is conditioned on, so are its samples
    narrow = {"steps": 3, "noise_level_min": 0.5, "noise_level_max": 2.0}
    plain = model.sample(3, **asked, sampler=Sampler(**narrow))
    zeros = {"text": torch.zeros(1, 3), "added": {"size": torch.zeros(1, 1)}}
    without = model.sample(3, cond=zeros, seed=0, sampler=Sampler(**narrow))
    guided = model.sample(3, **asked, sampler=Sampler(**narrow, guidance=3.0))
    torch.testing.assert_close(guided, without + 3 * (plain - without))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cond_dropout": 0.1}, "`cond_dropout` must be 0 as long as nothing stands for"),
        ({"cond_dropout": 1.1, "null_cond": "zeros"}, "`cond_dropout` must be between 0 and 1"),
        ({"sampler": Sampler(guidance=2)}, "`guidance` must be 1 without classes and without"),
    ],
)
def test_guidance_that_training_does_not_prepare_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        captioned(**options)


def test_a_null_condition_of_other_names_is_refused_in_the_first_step():
    model = captioned(cond_dropout=0.1, null_cond={"prompt": 0})
    with pytest.raises(ValueError, match=r"`null_cond` must have the names of the condition, \["):
        model.loss(BATCH, generator(0))


def test_a_model_that_encodes_no_prompts_says_what_to_override():
    with pytest.raises(ValueError, match=r"does not say how to encode 'prompt': override `encode"):
        Diffusion.encode_condition(captioned(), {"prompt": ["up"]})
