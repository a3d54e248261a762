"""Models that are retrained on subsets, all at once, against one that trains alone."""

import pytest
import torch
from support.networks import small_mlp
from support.points import normal_points, two_classes

from lightning_vr import CARV, VP, Clean, Diffusion
from lightning_vr.core.rng import generator
from lightning_vr.teachers import SubsetModels, subset_masks

POINTS = Clean(normal_points(10, "subsets"), two_classes(10))


def model():
    return Diffusion(small_mlp(std=1.0, num_class_embeds=3), VP(), num_classes=2)


def adam(parameters):
    return torch.optim.AdamW(parameters, 0.01)


def falling(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)


def test_subsets_have_one_size_and_differ():
    masks = subset_masks(10, 6, 0.3)
    assert masks.sum(dim=1).tolist() == [3] * 6
    assert len({tuple(mask.tolist()) for mask in masks}) > 1
    assert torch.equal(masks, subset_masks(10, 6, 0.3))


def test_each_model_is_one_that_trains_alone_on_its_part_of_the_batches():
    masks = subset_masks(10, 3)
    models = SubsetModels(model(), masks, adam, falling, seed=2)
    losses = models.train(POINTS, 4, batch_size=6, draws=CARV(2))
    assert losses.shape == (4, 3)
    for number in range(3):
        alone = model().eval()
        optimizer = adam(alone.parameters())
        lr_scheduler = falling(optimizer)
        for step in range(4):
            index = torch.randperm(10, generator=generator(2, "batches", step))[:6]
            source = generator(2, "retraining", step)
            noised = CARV(2)(POINTS.rows(index), alone.objective, source)
            own = masks[number][index].repeat_interleave(2)
            c = alone.objective.coefficients(noised.t)
            found = alone.network(c.input_scale[:, None] * noised.xt, 1000 * noised.t, noised.group)
            error = (found - c.output(noised.x0, noised.noise, noised.x0)).square().mean(dim=1)
            weighted = alone.objective.weight(noised.t) * error
            # of 6 samples half are in the subset on average
            loss = weighted[own].sum() / 12 / 0.5
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
            assert float(losses[step, number]) == pytest.approx(loss.item(), rel=1e-4)
        for name, value in models.parameters_of(number).items():
            torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_sample_outside_of_its_subset_never_counts_for_a_model():
    masks = subset_masks(10, 1)
    changed = Clean(torch.where(masks[0, :, None], POINTS.x0, 100.0), POINTS.group)
    found = []
    for clean in (POINTS, changed):
        models = SubsetModels(model(), masks)
        models.train(clean, 3, batch_size=10)
        found.append(models.parameters_of(0))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


def test_losses_of_queries_are_on_the_same_draws_for_all_models():
    masks = torch.ones(2, 10, dtype=torch.bool)
    models = SubsetModels(model(), masks)
    found = models.losses(POINTS, CARV(4))
    assert found.shape == (2, 10)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(models.losses(POINTS, CARV(4)), found)


def test_a_subset_without_a_sample_is_refused():
    with pytest.raises(ValueError, match="`masks` must give each subset one sample"):
        SubsetModels(model(), torch.zeros(2, 10, dtype=torch.bool))
