"""Draws that would not estimate the loss are refused when the module is built."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from support.networks import Normalised, small_mlp, small_unet
from torch import nn

from lightning_vr import (
    CARV,
    DSM,
    STF,
    Clean,
    DiffusionModule,
    LearnedProposal,
    ResidualMLP,
    TableProposal,
)
from lightning_vr.core.rng import generator
from lightning_vr.estimators.draws import IID
from lightning_vr.lifecycle.strategies import check_strategy
from lightning_vr.training.training_checks import check_optimization, check_ranks


@pytest.mark.parametrize("resamples", [2, "auto"])
def test_batch_normalisation_with_several_draws_of_a_sample_is_refused(resamples):
    network = Normalised(nn.BatchNorm1d)
    with pytest.raises(ValueError, match=r"the network's `norm` is a BatchNorm1d: use group"):
        DiffusionModule(network, draws=CARV(resamples))


@pytest.mark.parametrize("draws", [IID(), CARV(1), CARV(4)])
def test_normalisation_that_couples_no_draws_is_not_refused(draws):
    kind = nn.LayerNorm if draws.draws_per_sample > 1 else nn.BatchNorm1d
    DiffusionModule(Normalised(kind), draws=draws)


def test_clipping_of_single_draws_with_several_of_a_sample_is_refused():
    network = ResidualMLP(2, width=8)
    next(network.parameters()).grad_sample = None  # as Opacus prepares a network
    with pytest.raises(ValueError, match=r"clipped draw by draw, as ResidualMLP is prepared for"):
        DiffusionModule(network, draws=CARV(2))
    DiffusionModule(network, draws=CARV(1))


def test_a_proposal_that_misses_part_of_the_loss_is_refused():
    with pytest.raises(ValueError, match="a TableProposal that is zero at times from"):
        DiffusionModule(ResidualMLP(2, width=8), draws=CARV(2, TableProposal([1, 0, 1])))
    DiffusionModule(ResidualMLP(2, width=8), draws=CARV(2, LearnedProposal()))


class Trunk(DiffusionModule):
    def __init__(self, target):
        super().__init__(ResidualMLP(2, width=8), target=target)
        self.trunk = nn.Linear(2, 2)

    def encode(self, batch):
        return Clean(self.trunk(batch))


def test_references_that_a_trained_upstream_moves_are_refused():
    with pytest.raises(
        ValueError, match=r"`target` must be DSM\(\) if `encode` is trained.*got STF"
    ):
        Trunk(STF("batch")).loss(torch.ones(4, 2), generator(0))
    Trunk(DSM()).loss(torch.ones(4, 2), generator(0)).loss.backward()


def test_ranks_that_draw_differently_often_are_refused(monkeypatch):
    check_ranks(CARV(4))
    monkeypatch.setattr(
        "lightning_vr.training.training_checks.all_gather_numbers", lambda *_: [[4], [2]]
    )
    with pytest.raises(
        ValueError, match=r"`resamples` must be the same on all ranks.*got \[4, 2\]"
    ):
        check_ranks(CARV(4))


def test_a_device_without_float64_is_refused():
    module = DiffusionModule(ResidualMLP(2, width=8))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("mps")))
    with pytest.raises(ValueError, match=r"`accelerator` must have float64.*'mps'"):
        check_strategy(trainer, module)


@pytest.mark.parametrize(("largest", "is_far"), [(255.0, True), (16.0, True), (5.0, False)])
def test_images_far_outside_of_their_range_are_warned_of_once(largest, is_far):
    module = DiffusionModule(small_unet())
    images = torch.rand(2, 1, 8, 8, generator=generator("range")) * largest
    images[0, 0, 0, 0] = largest
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            module.loss({"image": images}, generator("range", step))
    found = [str(each.message) for each in caught if "Images should lie in" in str(each.message)]
    assert len(found) == is_far
    assert all(f"these reach {largest:.4g}" in message for message in found)


@pytest.mark.parametrize(("shift", "is_warned"), [(0.0, True), (-0.5, False)])
def test_pixels_from_0_to_1_are_warned_of(shift, is_warned):
    images = torch.rand(2, 1, 8, 8, generator=generator("unit range")) + shift
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DiffusionModule(small_unet()).loss({"image": images}, generator("range"))
    assert any("none of these pixels is below 0" in str(e.message) for e in caught) == is_warned


def classified():
    return DiffusionModule(small_mlp(num_class_embeds=3), num_classes=2)


def test_a_batch_without_labels_is_refused_where_the_model_has_classes():
    with pytest.raises(ValueError, match=r"must have labels with `num_classes`, which is 2, got"):
        classified().loss({"x0": torch.zeros(2, 2)}, generator("labels"))


@pytest.mark.parametrize(
    ("wrong", "advice"), [(5, "set `num_classes` to 6 or fix"), (-1, "number the classes from 0")]
)
def test_labels_out_of_range_are_refused_with_what_to_do(wrong, advice):
    with pytest.raises(ValueError, match=advice):
        classified().loss((torch.zeros(2, 2), torch.tensor([0, wrong])), generator("labels"))


def test_labels_of_later_batches_that_have_no_embedding_are_refused():
    model, x0 = classified(), torch.zeros(2, 2)
    model.loss((x0, torch.tensor([0, 1])), generator("labels"))
    with pytest.raises(ValueError, match=r"that ResidualMLP embeds, got labels of up to 5 .*: fix"):
        model.loss((x0, torch.tensor([0, 5])), generator("labels"))


def test_a_dictionary_without_images_is_refused_with_the_names_that_it_has():
    with pytest.raises(ValueError, match="got one with 'pixel_values', 'text': override"):
        Clean.from_batch({"pixel_values": torch.zeros(2, 2), "text": ["a", "b"]})


def test_points_may_lie_anywhere():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiffusionModule(small_mlp()).loss({"x0": torch.full((2, 2), 255.0)}, generator("range"))


@pytest.mark.parametrize("group", [{"lr": 1e300}, {"lr": 1.0, "betas": (0.9, -1e39)}])
def test_settings_of_an_optimizer_that_float32_cannot_hold_are_refused(group):
    optimizer = SimpleNamespace(param_groups=[{"params": [], **group}])
    with pytest.raises(ValueError, match=r"of the optimizer must be at most 3\.4e\+38"):
        check_optimization(optimizer, None)
    check_optimization(SimpleNamespace(param_groups=[{"params": [], "lr": 1e30}]), None)
