"""Measured gradients against plain autograd, one draw at a time, and what must not change."""

import copy
import random
import re
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.estimators.draws import IID
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.schedules import VP
from lightning_vr.process.timesteps import Uniform
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.noisy_losses import DiffusionLoss, GivenLoss
from lightning_vr.variance import gradient_measurement as gradients
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_measurement import GradientMeasurement
from lightning_vr.variance.moments import Moments

LIMIT = 4.0
"""Standard errors that a statistical test allows."""

CLASSES = 3


def mlp():
    network = ResidualMLP(2, width=8, depth=1, num_class_embeds=CLASSES + 1)
    nn.init.normal_(network.project_out.weight, std=0.3)
    return network


def unet(down="DownBlock2D", up="UpBlock2D"):
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        num_class_embeds=CLASSES + 1,
        down_block_types=(down, "DownBlock2D"),
        up_block_types=("UpBlock2D", up),
    )


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        norm_num_groups=1,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=CLASSES,
    )


NETWORKS = {
    "ResidualMLP": (mlp, (2,)),
    "UNet": (unet, (1, 8, 8)),
    "UNet with attention": (lambda: unet("AttnDownBlock2D", "AttnUpBlock2D"), (1, 8, 8)),
    "DiT": (dit, (1, 8, 8)),
}


def data(count, shape=(2,), *key):
    source = generator("data", *key)
    x0 = torch.randn(count, *shape, generator=source)
    return Clean(x0, group=torch.randint(CLASSES, (count,), generator=source))


def source(*key):
    return generator(3, *key)


def measurement(module, loss=None, source=source):
    return GradientMeasurement(loss or DiffusionLoss(module), source, parameter_groups(module)[1])


@pytest.fixture(params=NETWORKS)
def case(request):
    build, shape = NETWORKS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build()
    module = DiffusionModule(
        network, VP(), "v", num_classes=CLASSES, label_dropout=0.3 if shape == (2,) else 0.0
    )
    # label dropout inside of DiT draws from the global state, in training alone
    return module.train(request.param == "ResidualMLP"), data(3, shape)


def row_of(rows, i):
    return {k: row_of(v, i) if isinstance(v, dict) else v[i : i + 1] for k, v in rows.items()}


def one_by_one(measured, clean, *key):
    """Gradients of all draws, from plain backward passes, for each parameter ``(n, 4, *)``."""
    parameters = [p for p in measured.loss.parameters() if p.requires_grad]
    draws = measured._draws(clean, key, 0.0, 1.0)
    units = []
    for i in range(len(clean.x0)):
        found = [torch.autograd.grad(measured.loss(row_of(r, i)).sum(), parameters) for r in draws]
        units.append([torch.stack(each) for each in zip(*found, strict=True)])
    return [torch.stack(each) for each in zip(*units, strict=True)]


def by_enumeration(gradients):
    """Means over all pairs of draws ``(n, 4, d)`` that share just what they are to share."""
    units = len(gradients)
    pairs = {"same time": [], "same data": [], "nothing": []}
    flat = gradients.reshape(4 * units, -1).double()
    for i in range(4 * units):
        for j in range(4 * units):
            shared = "nothing" if i // 4 != j // 4 else "same data"
            shared = "same time" if i // 2 == j // 2 else shared
            if i != j:
                pairs[shared].append(flat[i] @ flat[j])
    levels = [flat.square().sum(1).mean(), *(torch.stack(each).mean() for each in pairs.values())]
    noise, timestep, data = (a - b for a, b in pairwise(levels))
    return Components(data, timestep, noise, noise + timestep + data, levels[-1])


def by_group(found, groups):
    """The whole gradient first, then each group of parameters, flat ``(n, 4, d)``."""
    flat = [g.flatten(2) for g in found]
    parts = [
        [f for f, group in zip(flat, groups, strict=True) if group == each]
        for each in range(max(groups) + 1)
    ]
    return [torch.cat(flat, 2), *(torch.cat(part, 2) for part in parts)]


def test_per_sample_components_are_those_of_single_backward_passes(case):
    module, clean = case
    measured = measurement(module)
    assert measured.why_unavailable(clean) is None
    found = measured.per_sample(clean, "whole")
    parts = by_group(one_by_one(measured, clean, "whole"), measured.groups)
    for column, part in enumerate(parts):
        expected = by_enumeration(part)
        size = float(expected.second_moment)
        for name, value in expected._asdict().items():
            found_value = float(getattr(found, name)[column])
            assert found_value == pytest.approx(float(value), rel=1e-5, abs=1e-5 * size), name
        assert size > 0 or float(part.abs().max()) == 0
    assert all(float(value[0]) != 0 for value in found)


def test_by_differences_are_components_of_the_gradients_of_batches(case):
    """Batches of two: their gradient is the mean of two, and components times two."""
    module, clean = case
    batches = [clean.rows(slice(0, 2)), clean.rows(slice(1, 3))]
    measured = measurement(module)
    found = measured.by_differences(batches, "whole")
    units = [
        [g.mean(0, keepdim=True) for g in one_by_one(measured, batch, "whole", unit)]
        for unit, batch in enumerate(batches)
    ]
    parts = by_group([torch.cat(each) for each in zip(*units, strict=True)], measured.groups)
    for column, part in enumerate(parts):
        expected = by_enumeration(part)
        size = float(expected.second_moment)
        factors = {"squared_mean": 1}
        for name, value in expected._asdict().items():
            value = factors.get(name, 2) * float(value)
            assert float(getattr(found, name)[column]) == pytest.approx(
                value, rel=1e-5, abs=1e-5 * size
            ), name


@pytest.mark.parametrize("rows", [4, 8, 12, 16, 28, 1000])
def test_bins_measured_together_are_those_measured_one_by_one(monkeypatch, rows):
    """Three bins of three samples: chunks of so many rows are pieces of a bin or hold several."""
    module = DiffusionModule(mlp(), VP(), "v", num_classes=CLASSES)
    clean, size = data(10), sum(p.numel() for p in module.parameters())
    monkeypatch.setattr(gradients, "_CHUNK_ELEMENTS", rows * size)
    together = measurement(module).per_sample_by_level(clean, 3, "bins")
    assert len(together) == 3
    for i, found in enumerate(together):
        part = clean.rows(slice(3 * i, 3 * i + 3))
        alone = measurement(module).per_sample(part, "bins", i, low=i / 3, high=(i + 1) / 3)
        torch.testing.assert_close(torch.stack(found), torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_every_bin_needs_two_samples():
    module = DiffusionModule(mlp(), VP(), "v", num_classes=CLASSES)
    with pytest.raises(ValueError, match="need at least 2 samples"):
        measurement(module).per_sample_by_level(data(5), 3, "bins")


def test_chunks_of_one_unit_change_nothing(monkeypatch):
    module, clean = DiffusionModule(mlp(), VP(), num_classes=CLASSES), data(5)
    whole = measurement(module).per_sample(clean)
    monkeypatch.setattr(gradients, "_CHUNK_ELEMENTS", 1)
    for a, b in zip(measurement(module).per_sample(clean), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_a_loss_scale_is_taken_off_again(scale):
    module, clean = DiffusionModule(mlp(), VP(), num_classes=CLASSES), data(4)
    plain, scaled = measurement(module), measurement(module)
    scaled.loss_scale = scale
    for a, b in zip(scaled.per_sample(clean), plain.per_sample(clean), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    batches = [clean.rows(slice(0, 2)), clean.rows(slice(2, 4))]
    for a, b in zip(scaled.by_differences(batches), plain.by_differences(batches), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_frozen_and_unused_parameters_have_no_part_in_it():
    module = DiffusionModule(mlp(), VP())
    module.network.project_in.requires_grad_(False)
    names, _ = parameter_groups(module)
    assert "project_in" not in names
    clean = Clean(data(4).x0)
    measured = measurement(module)
    found = measured.per_sample(clean)
    batches = [clean.rows(slice(0, 2)), clean.rows(slice(2, 4))]
    differences = measured.by_differences(batches)
    unused = 1 + names.index("embed_class")
    for components in (found, differences):
        assert len(components.total) == 1 + len(names)
        assert float(components.total[unused]) == 0
        assert (components.second_moment[:unused] > 0).all()


def repeated(measure, repeats):
    moments = None
    for repeat in range(repeats):
        components = torch.stack(tuple(measure(repeat)))
        moments = moments or Moments(*components.shape)
        moments.add(components)
    return moments


@pytest.mark.parametrize("bin", [(0.0, 1.0), (0.75, 1.0)], ids=["all", "bin"])
def test_both_ways_to_measure_agree_on_a_network(bin):
    torch.manual_seed(0)
    module = DiffusionModule(mlp(), VP(), "v", num_classes=CLASSES, label_dropout=0.2)
    low, high = bin

    def measured(repeat):
        return measurement(module, source=lambda *key: generator(repeat, *key))

    def per_sample(repeat):
        return measured(repeat).per_sample(data(48, (2,), repeat), low=low, high=high)

    def by_differences(repeat):
        batches = [data(8, (2,), repeat, unit) for unit in range(2)]
        return measured(repeat).by_differences(batches, low=low, high=high)

    a, b = repeated(per_sample, 20), repeated(by_differences, 40)
    z = (a.mean - b.mean) / torch.hypot(a.error, b.error)
    assert (z.abs() < LIMIT).all(), z
    assert (a.mean[3, 0] / torch.hypot(a.error, b.error)[3, 0]) > 2 * LIMIT


def test_times_of_a_bin_lie_between_its_quantiles():
    module = DiffusionModule(mlp(), VP(), timesteps=Uniform(0.2, 1.0))
    loss = DiffusionLoss(module)
    for low, high in ((0.0, 1.0), (0.25, 0.5)):
        t, weight, _ = loss.times(data(500), source(), low, high)
        assert 0.2 + 0.8 * low <= float(t.min()) <= float(t.max()) <= 0.2 + 0.8 * high
        assert float(t.max() - t.min()) > 0.9 * 0.8 * (high - low)
        assert (weight == 1).all()


def test_times_of_a_given_loss_lie_between_quantiles_too():
    loss = GivenLoss(Points(), mean_error, Uniform(0.2, 1.0))
    t = loss.times(data(500), source(), 0.25, 0.5).t
    assert 0.4 <= float(t.min()) < 0.42 < 0.58 < float(t.max()) <= 0.6


@pytest.mark.parametrize(("method", "count"), [("per sample", 7), ("by differences", 20)])
def test_everything_that_is_drawn_has_a_key_of_its_own(method, count):
    """Two times, four noises, and the global state of a pass or, per sample, of all."""
    keys = []

    def remembered(*key):
        keys.append(key)
        return source(*key)

    module = DiffusionModule(mlp(), VP(), num_classes=CLASSES)
    METHODS[method](measurement(module, source=remembered), data(4))
    assert len(keys) == len(set(keys)) == count


class Network(nn.Module):
    """A small network around a layer."""

    def __init__(self, layer=None):
        super().__init__()
        self.first = nn.Linear(2, 6)
        self.layer = nn.Identity() if layer is None else layer
        self.last = nn.Linear(6, 2)

    def forward(self, x, t):
        return self.last(torch.tanh(self.layer(self.first(x) + t[:, None] / 1000)))


class Branches(nn.Module):
    def forward(self, x):
        return x if x.abs().mean().item() > 0.5 else 2 * x


def module_with(layer, **options):
    torch.manual_seed(0)
    return DiffusionModule(Network(layer), VP(), "v", **options)


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Coupled(IID):
    couples_rows = True


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (module_with(nn.BatchNorm1d(6)), "network.layer normalises over the batch"),
        (
            module_with(nn.BatchNorm1d(6, track_running_stats=False)).eval(),
            "network.layer normalises over the batch",
        ),
        (module_with(None, draws=Coupled()), "the draws of a batch depend on each other"),
        (module_with(Branches()), r"functorch says: vmap: It looks like .*\.item\(\)"),
        (module_with(Checkpointed(nn.Linear(6, 6))), r"functorch says: .* saved tensor hooks"),
    ],
    ids=[
        "batch norm",
        "batch norm without statistics",
        "coupled rows",
        "control flow",
        "checkpoint",
    ],
)
def test_what_single_draws_cannot_tell_is_named_and_measured_by_differences(module, reason):
    measured, clean = measurement(module), Clean(data(4).x0)
    found = measured.why_unavailable(clean)
    assert found is not None
    assert re.match(reason, found), found

    components = measured.by_differences([clean.rows(slice(0, 2)), clean.rows(slice(2, 4))])
    assert all(value.isfinite().all() for value in components)
    assert (components.second_moment[0] > 0).all()


@pytest.mark.parametrize(
    "module",
    [
        module_with(nn.Dropout(0.5)),
        module_with(nn.BatchNorm1d(6)).eval(),
        module_with(nn.LayerNorm(6)),
    ],
    ids=["dropout", "batch norm in evaluation", "layer norm"],
)
def test_nothing_stands_in_the_way_of_layers_that_treat_rows_alone(module):
    measured, clean = measurement(module), Clean(data(4).x0)
    assert measured.why_unavailable(clean) is None
    assert all(value.isfinite().all() for value in measured.per_sample(clean))


def test_by_differences_a_checkpoint_changes_no_gradient_and_no_buffer():
    """A checkpoint runs its layers again on the way back, batch normalisation included."""
    found = []
    for kind in (nn.Sequential, Checkpointed):
        torch.manual_seed(1)
        module = module_with(kind(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)))
        before = copy.deepcopy(module.state_dict())
        clean = Clean(data(4).x0)
        batches = [clean.rows(slice(0, 2)), clean.rows(slice(2, 4))]
        found.append(measurement(module).by_differences(batches))
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x, t):
        return self.second(torch.tanh(self.first(x)))


def test_a_weight_that_layers_share_counts_once():
    torch.manual_seed(0)
    module, clean = DiffusionModule(Tied(), VP(), "v"), Clean(data(3).x0)
    measured = measurement(module)
    assert len(measured.groups) == 3
    expected = by_enumeration(by_group(one_by_one(measured, clean), measured.groups)[0])
    for a, b in zip(measured.per_sample(clean), expected, strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-5, atol=1e-5)

    batches = [clean.rows(slice(i, i + 1)) for i in range(2)]
    units = [one_by_one(measured, batch, i) for i, batch in enumerate(batches)]
    parts = [torch.cat(each) for each in zip(*units, strict=True)]
    expected = by_enumeration(by_group(parts, measured.groups)[0])
    for a, b in zip(measured.by_differences(batches), expected, strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-5, atol=1e-5)


def test_each_draw_has_a_dropout_mask_of_its_own_and_a_key_repeats_it():
    clean = Clean(data(6).x0)
    with_dropout, without = (module_with(layer) for layer in (nn.Dropout(0.5), None))
    dropped, again = (measurement(with_dropout).per_sample(clean, "a") for _ in range(2))
    other = measurement(with_dropout).per_sample(clean, "b")
    plain = measurement(without).per_sample(clean, "a")
    assert all(torch.equal(a, b) for a, b in zip(dropped, again, strict=True))
    assert not torch.equal(dropped.total, other.total)
    assert not torch.allclose(dropped.noise, plain.noise, rtol=0.01)


def _fires(*_):
    raise AssertionError("a hook of the user fired")


def global_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


METHODS = {
    "per sample": lambda m, clean: m.per_sample(clean),
    "by differences": lambda m, clean: m.by_differences(
        [clean.rows(slice(0, 2)), clean.rows(slice(2, 4))]
    ),
    "why_unavailable": lambda m, clean: m.why_unavailable(clean),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("has_grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("method", METHODS)
def test_a_measurement_changes_nothing(method, has_grad, training):
    is_per_sample = method == "per sample"
    layer = nn.Sequential(
        nn.BatchNorm1d(6) if not (is_per_sample and training) else nn.LayerNorm(6), nn.Dropout(0.5)
    )
    module = module_with(layer).train(training)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter) if has_grad else None
        parameter.register_hook(_fires)
        parameter.register_post_accumulate_grad_hook(_fires)
    clean = Clean(data(4).x0)
    before = copy.deepcopy(module.state_dict())
    grads = [p.grad for p in module.parameters()]
    copies = copy.deepcopy(grads)
    pointers = [p.data_ptr() for p in module.parameters()]
    states = global_states()

    METHODS[method](measurement(module), clean)

    assert global_states() == states
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert pointers == [p.data_ptr() for p in module.parameters()]
    for parameter, grad, copied in zip(module.parameters(), grads, copies, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, copied)
        assert parameter.requires_grad
        assert parameter.grad_fn is None
    assert all(part.training == training for part in module.modules())
    assert torch.equal(clean.x0, data(4).x0)


class Points(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(2, 2)


def mean_error(module, x0, noise, t):
    xt = (1 - t[:, None]) * x0 + t[:, None] * noise
    return (module.network(xt) - noise + x0).square().mean(1)


def test_a_loss_that_is_given_as_a_function_is_measured_like_any_other():
    torch.manual_seed(0)
    module, clean = Points(), Clean(data(3).x0)
    measured = measurement(module, GivenLoss(module, mean_error, Uniform(0.0, 1.0)))
    assert measured.why_unavailable(clean) is None
    found = measured.per_sample(clean)
    parts = by_group(one_by_one(measured, clean), measured.groups)
    for column, part in enumerate(parts):
        for a, b in zip(found, by_enumeration(part), strict=True):
            torch.testing.assert_close(a[column], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduce", [torch.mean, lambda x: x[:, None]], ids=["mean", "column"])
def test_a_given_loss_that_is_not_one_number_for_each_sample_is_refused(reduce):
    module = Points()
    loss = GivenLoss(module, lambda *arguments: reduce(mean_error(*arguments)), Uniform())
    batches = [Clean(data(3).x0)] * 2
    with pytest.raises(
        ValueError, match="`loss` must return one number for each of the 3 samples, got a tensor"
    ):
        measurement(module, loss).by_differences(batches)


@pytest.mark.parametrize("method", ["per sample", "by differences"])
def test_one_sample_or_batch_is_refused(method):
    module, one = DiffusionModule(mlp(), VP()), Clean(data(1).x0)
    measured = measurement(module)
    with pytest.raises(ValueError, match="need at least 2 samples or batches, got 1"):
        measured.per_sample(one) if method == "per sample" else measured.by_differences([one])


def test_groups_are_the_first_names_in_which_parameters_differ():
    module = DiffusionModule(mlp(), VP())
    names, groups = parameter_groups(module)
    expected = ["project_in", "embed_time", "embed_class", "blocks", "project_out"]
    assert names == expected
    of_each = [name.split(".")[1] for name, _ in module.named_parameters()]
    assert [names[group] for group in groups] == of_each


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), (["weight", "bias"], [0, 1])),
        (nn.Linear(2, 2, bias=False), (["weight"], [0])),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2))), (["weight", "bias"], [0, 1])),
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 2, bias=False)), (["weight"], [0])),
        (nn.Sequential(nn.Linear(2, 2), nn.PReLU()), (["0", "1"], [0, 0, 1])),
    ],
)
def test_groups_of_small_modules(module, expected):
    assert parameter_groups(module) == expected


def test_groups_are_those_of_trainable_parameters():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    assert parameter_groups(module) == (["weight", "bias"], [0, 1])
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="must have trainable parameters, got a Sequential"):
        parameter_groups(module)
