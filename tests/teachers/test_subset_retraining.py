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


def test_subsets_have_one_size_and_differ():
    masks = subset_masks(10, 6, 0.3)
    assert masks.sum(dim=1).tolist() == [3] * 6
    assert len({tuple(mask.tolist()) for mask in masks}) > 1
    assert torch.equal(masks, subset_masks(10, 6, 0.3))


def test_each_model_is_one_that_trains_alone_on_its_subset():
    masks = subset_masks(10, 3)
    models = SubsetModels(model(), masks, lambda p: torch.optim.AdamW(p, 0.01), seed=2)
    losses = models.train(POINTS, 4, batch_size=6, draws=CARV(2))
    assert losses.shape == (4, 3)
    for number in range(3):
        alone = model().eval()
        optimizer = torch.optim.AdamW(alone.parameters(), 0.01)
        for step in range(4):
            order = generator(2, "batches", step)
            index = masks.double().multinomial(6, replacement=True, generator=order)
            assert bool(masks[number][index[number]].all())
            # all models have the draws of the first one's batch
            first = POINTS.rows(index[0])
            source = generator(2, "retraining", step)
            tape = CARV(2)(Clean(first.x0), alone.objective, source)
            own = POINTS.rows(index[number]).repeated(2)
            t, noise = tape.t, tape.noise
            xt = VP().perturb(own.x0, noise, t)
            coefficients = alone.objective.coefficients(t)
            found = alone.network(coefficients.input_scale[:, None] * xt, 1000 * t, own.group)
            target = coefficients.output(own.x0, noise, own.x0)
            weight = alone.objective.weight(t)
            loss = (weight * (found - target).square().mean(dim=1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert float(losses[step, number]) == pytest.approx(loss.item(), rel=1e-4)
        for name, value in models.parameters_of(number).items():
            torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-4, atol=1e-5)


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
