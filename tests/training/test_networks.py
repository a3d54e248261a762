"""Networks of every kind train and sample, with the settings that they have."""

from functools import partial

import pytest
import torch
from support.compilers import Compiled
from support.diffusers_networks import KINDS, WITH_LABELS, condition, shape_of, tiny
from support.networks import small_mlp, small_unet
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader

from lightning_vr import CARV, Clean, DiffusionModule, InDtype, Sampler
from lightning_vr.core.rng import generator
from lightning_vr.lifecycle.configuration import describe

CHECKPOINTED = [kind for kind in KINDS if kind != "MLP"]
WITH_ATTENTION = [kind for kind in CHECKPOINTED if kind != "UNet"]  # none at this size


class Conditioned(DiffusionModule):
    """A module whose batches hold a condition."""

    def encode(self, batch):
        return Clean(**batch)


def batch_of(kind, count=4):
    x0 = torch.randn(count, *shape_of(kind), generator=torch.Generator().manual_seed(3))
    labels = torch.arange(count) % 3 if kind in WITH_LABELS else None
    cond = condition(kind, count)
    parts = {"x0": x0, "group": labels, "cond": cond}
    return {name: value for name, value in parts.items() if value is not None}


def batches(batch):
    """Return a loader of the same batch, twice."""
    return DataLoader([batch, batch], batch_size=None)


def module_of(kind, **options):
    classes = {"num_classes": 3} if kind in WITH_LABELS else {}
    return Conditioned(tiny(kind), **classes, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_trains_a_step_and_samples(kind):
    module, before = module_of(kind), [p.clone() for p in tiny(kind).parameters()]
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)

    loader = batches(batch_of(kind))
    trainer.fit(module, loader, loader)

    after = list(module.network.parameters())
    assert sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) > len(after) / 2
    group = [0, 1, 2] if kind in WITH_LABELS else None
    found = module.sample(3, group=group, cond=condition(kind, 3), sampler=Sampler(steps=2))
    assert found.shape == (3, *shape_of(kind))
    assert bool(torch.isfinite(found).all())


def test_the_output_about_the_variance_is_no_part_of_the_loss():
    module, batch = module_of("DiT"), batch_of("DiT")
    module.loss(batch, generator(0)).loss.backward()
    last = module.network.proj_out_2.weight.grad.reshape(2, 2, 4, -1)  # of patches and channels
    assert bool((last[:, :, :2] != 0).any())
    assert bool((last[:, :, 2:] == 0).all())


def test_a_dit_drops_no_labels_of_its_own():
    module, batch = module_of("DiT").train(), batch_of("DiT", 64)
    losses = [module.loss(batch, generator(0)).loss for _ in range(2)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"num_classes": 2}, r"`num_classes` must be 3, the num_embeds_ada_norm .* got 2: set one"),
        ({}, r"`num_classes` must be given, as DiT.* has num_embeds_ada_norm=3, .* to 3"),
    ],
    ids=["too few", "none"],
)
def test_labels_that_a_dit_does_not_embed_are_refused(classes, words):
    with pytest.raises(ValueError, match=words):
        DiffusionModule(tiny("DiT"), **classes)


def test_labels_for_a_network_that_takes_none_are_refused():
    with pytest.raises(ValueError, match=r"must take the call SD3.*\(x, t, class_labels=\.\.\.\)"):
        Conditioned(tiny("SD3"), num_classes=3)


def gradients(module, batch):
    module.loss(batch, generator(0)).loss.backward()
    return [parameter.grad for parameter in module.network.parameters()]


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_checkpointed_activations_give_the_same_gradients(kind, monkeypatch):
    batch, calls = batch_of(kind), []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint,
        "checkpoint",
        lambda *args, **kwargs: calls.append(kwargs) or checkpoint(*args, **kwargs),
    )

    plain = gradients(module_of(kind), batch)
    assert not calls
    checkpointed = gradients(module_of(kind, gradient_checkpointing=True), batch)

    assert calls
    for a, b in zip(plain, checkpointed, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_checkpointed_activations_also_with_several_draws_in_chunks():
    draws = partial(CARV, 4, chunk_size=3)
    batch = {"x0": torch.randn(4, 1, 8, 8, generator=generator(0))}
    plain, checkpointed = (
        gradients(DiffusionModule(small_unet(), draws=draws(), gradient_checkpointing=on), batch)
        for on in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("kind", WITH_ATTENTION)
def test_attention_is_torchs_fused_one(kind, monkeypatch):
    """So that there is no setting of it: its memory is linear in the number of tokens."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs),
    )
    module_of(kind).loss(batch_of(kind), generator(0))
    assert calls


def test_checkpoints_of_activations_that_a_network_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"`gradient_checkpointing` must be False .* ResidualMLP"):
        DiffusionModule(small_mlp(), gradient_checkpointing=True)


@pytest.fixture
def compiled(monkeypatch):
    """Let networks be compiled by a backend that needs no compiler of C, and counts."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function: compile_(function, backend=Compiled.backend)
    )
    torch.compiler.reset()
    Compiled.calls = 0
    yield torch.compile
    torch.compiler.reset()


def same_weights(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def trained(network, tmp_path, **options):
    """Train two steps, and return the module and the file of its checkpoint."""
    module = DiffusionModule(network, **options)
    module.seed = 0
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    loader = batches({"x0": torch.ones(4, 2)})
    trainer.fit(module, loader, loader)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.ckpt"
    trainer.save_checkpoint(path)
    return module, path


@pytest.mark.parametrize("by", ["setting", "user"])
def test_a_compiled_network_has_checkpoints_of_plain_names(by, tmp_path, compiled):
    network, options = small_mlp(std=0.5), {"compile_network": True}
    if by == "user":
        network, options = compiled(network), {}
    module, path = trained(network, tmp_path, **options)
    assert Compiled.calls >= 2

    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"].keys() == DiffusionModule(small_mlp()).state_dict().keys()
    _, plain = trained(small_mlp(std=0.5), tmp_path)
    for name, weight in torch.load(plain, weights_only=True)["state_dict"].items():
        torch.testing.assert_close(saved["state_dict"][name], weight)

    again = DiffusionModule.load_from_checkpoint(path)
    wrapped = DiffusionModule.load_from_checkpoint(path, network=compiled(small_mlp()))
    assert same_weights(again, module)
    assert same_weights(wrapped, module)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_names_of_the_compiler_are_loaded_too(is_compiled, compiled):
    source = DiffusionModule(small_mlp(std=0.5))
    state = {
        name.replace("network.", "network._orig_mod."): x for name, x in source.state_dict().items()
    }
    assert state.keys() != source.state_dict().keys()
    network = compiled(small_mlp()) if is_compiled else small_mlp()
    module = DiffusionModule(network)
    module.load_state_dict(state)
    assert same_weights(module, source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_checkpoint_rebuilds_a_network_in_its_dtype(dtype, tmp_path):
    kind = getattr(torch, dtype)
    sgd = partial(torch.optim.SGD, lr=1e-3)  # the smallest number of AdamW is 0 in float16
    module, path = trained(InDtype(small_mlp(std=0.5), dtype), tmp_path, optimizer=sgd)
    again = DiffusionModule.load_from_checkpoint(path)
    assert same_weights(again, module)
    assert {parameter.dtype for parameter in again.network.parameters()} == {kind}
    first, second = (x.sample(4, seed=1, sampler=Sampler(steps=3)) for x in (module, again))
    assert torch.equal(first, second)


def test_weights_of_several_dtypes_are_not_described():
    network = small_mlp()
    network.project_out.double()
    with pytest.raises(ValueError, match=r"weights have the dtypes torch.float32, torch.float64"):
        describe(network)
