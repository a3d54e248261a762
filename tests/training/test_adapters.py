"""Adapters of low rank: what trains, what checkpoints hold, and what resumes."""

from functools import partial

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from support.networks import small_mlp, small_unet
from support.stops import StopAt, StoppedError
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader, Dataset

from lightning_vr import EMA, Clean, DiffusionModule, GradientVariance, Pretrained, Sampler, export
from lightning_vr.core.gradients import aliases
from lightning_vr.core.rng import generator
from lightning_vr.training.adapters import LoRA, merged
from lightning_vr.training.incoming_folder import IncomingFolder
from lightning_vr.training.noisy_losses import DiffusionLoss

pytest.importorskip("peft", reason="needs the extra 'adapters'")

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

ATTENTION = {
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",),
    "attention_head_dim": 4,
}


class Images(Dataset):
    x0 = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2

    def __len__(self):
        return len(self.x0)

    def __getitem__(self, i):
        return {"x0": self.x0[i], "index": i}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a pretrained network."""
    path = tmp_path_factory.mktemp("pretrained") / "unet"
    small_unet(**ATTENTION).save_pretrained(path)
    return path


def module(folder, rank=2, **options):
    torch.manual_seed(0)
    return DiffusionModule(
        Pretrained(str(folder)), adapter=LoRA(rank), sampler=Sampler(steps=2), **options
    )


def fitted(model, *callbacks, steps=2, **options):
    trainer = quiet_trainer(*callbacks, max_steps=steps, limit_val_batches=0)
    trainer.fit(model, DataLoader(Images(), batch_size=6), **options)
    return trainer


def trained_names(model):
    return {name for name, x in model.named_parameters() if x.requires_grad}


def test_the_adapter_alone_trains_and_begins_as_the_network_itself(folder):
    model, plain = module(folder), Pretrained(str(folder))
    assert trained_names(model)
    assert all(".lora_" in name for name in trained_names(model))
    x, t = Images.x0[:2], torch.tensor([3.0, 500.0])
    torch.testing.assert_close(model.network(x, t).sample, plain(x, t).sample)

    before = {name: x.clone() for name, x in model.network.state_dict().items()}
    fitted(model)
    changed = {n for n, x in model.network.state_dict().items() if not torch.equal(x, before[n])}
    assert changed
    assert {f"network.{name}" for name in changed} <= trained_names(model)


def test_the_loss_falls(folder):
    model = module(folder, optimizer=partial(torch.optim.AdamW, lr=0.02))

    @torch.no_grad()
    def loss():
        batch = {"x0": Images.x0.repeat(20, 1, 1, 1)}
        return float(model.loss(batch, generator("held out")).loss)

    before = loss()
    fitted(model, steps=30)
    assert loss() < 0.98 * before


def test_the_change_is_the_product_of_two_maps_times_alpha_over_rank(folder):
    model = DiffusionModule(Pretrained(str(folder)), adapter=LoRA(2, ["to_q"], alpha=6))
    layer = next(m for n, m in model.network.named_modules() if n.endswith("to_q"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(3, layer.in_features)
    expected = layer.base_layer(x) + 6 / 2 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("averaged", [False, True])
def test_checkpoints_hold_the_adapter_and_load_with_the_network_of_the_folder(
    folder, averaged, tmp_path
):
    model = module(folder)
    callbacks = [EMA(decay=0.5)] if averaged else []
    fitted(model, *callbacks).save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for weights in ("state_dict", "current_model_state") if averaged else ("state_dict",):
        names = [name for name in saved[weights] if name.startswith("network.")]
        assert names
        assert all(".lora_" in name for name in names)

    with pytest.raises(ValueError, match=r"`network` of the module in .* must be given again"):
        DiffusionModule.load_from_checkpoint(tmp_path / "last.ckpt")
    network = Pretrained(str(folder))
    again = DiffusionModule.load_from_checkpoint(tmp_path / "last.ckpt", network=network)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())
    assert torch.equal(again.sample(2, seed=0), model.sample(2, seed=0))


@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_that_was_killed_goes_on_bitwise_as_one_that_was_not(folder, averaged, tmp_path):
    def callbacks():
        return [EMA(decay=0.9)] if averaged else []

    whole, first, second = module(folder), module(folder), module(folder)
    fitted(whole, *callbacks(), steps=4)
    stop = StopAt("on_train_batch_end", 2, tmp_path / "last.ckpt")
    with pytest.raises(StoppedError):
        fitted(first, *callbacks(), stop, steps=4)
    resumed = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
    fitted(second, *callbacks(), steps=4, **resumed).save_checkpoint(tmp_path / "end.ckpt")
    expected = whole.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in second.state_dict().items())
    # an average rounds no weights that stay as they are
    network = Pretrained(str(folder))
    again = DiffusionModule.load_from_checkpoint(tmp_path / "end.ckpt", network=network)
    assert all(torch.equal(x, expected[name]) for name, x in again.state_dict().items())


def test_other_weights_than_the_adapter_was_trained_on_are_refused(folder, tmp_path):
    fitted(module(folder)).save_checkpoint(tmp_path / "last.ckpt")
    other = small_unet(**ATTENTION)
    torch.nn.init.normal_(other.conv_in.weight)
    other.save_pretrained(tmp_path / "other")
    network = Pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="`network` must have the weights that the adapter"):
        DiffusionModule.load_from_checkpoint(tmp_path / "last.ckpt", network=network)


def test_a_network_from_no_folder_is_saved_whole(tmp_path):
    model = DiffusionModule(small_unet(**ATTENTION), adapter=LoRA(2), sampler=Sampler(steps=2))
    fitted(model).save_checkpoint(tmp_path / "last.ckpt")
    again = DiffusionModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


def test_gradient_variance_is_that_of_the_adapter(folder):
    watch = GradientVariance(every_n_steps=1)
    model = module(folder)
    fitted(model, watch)
    assert watch.statistics.groups == ["down_blocks", "up_blocks", "mid_block"]  # not conv_in
    assert (watch.statistics.whole.total > 0).any()
    parameters, fixed = aliases(DiffusionLoss(model))  # what per-sample gradients are taken by
    assert {name.removeprefix("module.") for name in parameters} == trained_names(model)
    assert not fixed.keys() & parameters.keys()


def test_a_folder_gives_the_network_beneath_an_adapter(tmp_path):
    saved = DDPMPipeline(small_unet(**ATTENTION), DDPMScheduler())
    torch.nn.init.normal_(saved.unet.conv_out.bias)
    saved.save_pretrained(tmp_path / "folder")
    model = DiffusionModule.from_pretrained(tmp_path / "folder", adapter=LoRA(2))
    fitted(model).save_checkpoint(tmp_path / "last.ckpt")
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name for name in weights if name.startswith("network."))

    other = DiffusionModule(small_unet(**ATTENTION), adapter=LoRA(2))
    IncomingFolder.read(tmp_path / "folder").load_weights(other.network)
    found = merged(other.network).state_dict()
    assert all(torch.equal(x, found[name]) for name, x in saved.unet.state_dict().items())


def test_adapters_in_other_precisions_train(folder):
    model = DiffusionModule(Pretrained(str(folder), dtype="bfloat16"), adapter=LoRA(2))
    fitted(model)
    kinds = {x.dtype for name, x in model.named_parameters() if x.requires_grad}
    assert kinds == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"alpha": 0}, "`alpha` must be at least 1, got 0"),
        ({"targets": []}, "`targets` must be names of layers"),
        ({"targets": "to_q"}, "`targets` must be names of layers, got 'to_q': give a list"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="`targets` must name layers of the ResidualMLP"):
        DiffusionModule(small_mlp(), adapter=LoRA())
    model = DiffusionModule(small_mlp(), adapter=LoRA(1, ["project_in"]))
    with pytest.raises(ValueError, match="`network` must have no adapter yet"):
        DiffusionModule(model.network, adapter=LoRA(1, ["project_in"]))


class TextToImage(DiffusionModule):
    def encode(self, batch):
        return Clean(batch["x0"], cond={"encoder_hidden_states": torch.zeros(1, 3, 8)})


WITH_TEXT = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
SIZES = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
}


def test_attention_to_text_is_adapted_too():
    model = TextToImage(UNet2DConditionModel(**SIZES, **WITH_TEXT), adapter=LoRA(2))
    fitted(model)
    assert any(".attn2.to_k.lora_A" in name for name in trained_names(model))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with an adapter, its folder of diffusers, and the folder of the adapter."""
    top = tmp_path_factory.mktemp("exported")
    UNet2DConditionModel(**SIZES, **WITH_TEXT).save_pretrained(top / "unet")
    model = TextToImage(Pretrained(str(top / "unet")), adapter=LoRA(2, alpha=6))
    fitted(model)
    export(model, top / "lora", "lora")
    return model.eval(), top


def outputs(network):
    text = torch.ones(2, 3, 8)
    with torch.no_grad():
        return network.eval()(Images.x0[:2], torch.tensor([3.0, 500.0]), text).sample


def test_diffusers_loads_the_adapter_alone_with_its_scale(exported):
    model, top = exported
    stock = UNet2DConditionModel.from_pretrained(top / "unet")
    plain = outputs(stock)
    stock.load_lora_adapter(str(top / "lora"), prefix="unet", use_safetensors=True)
    assert not torch.allclose(outputs(stock), plain)
    torch.testing.assert_close(outputs(stock), outputs(model.network))


def test_other_formats_hold_the_adapter_in_the_weights(exported):
    model, top = exported
    export(model, top / "plain", "safetensors")
    stock = UNet2DConditionModel.from_pretrained(top / "unet")
    stock.load_state_dict(load_file(top / "plain/model.safetensors"))
    torch.testing.assert_close(outputs(stock), outputs(model.network))
    assert any(".lora_A" in name for name in model.state_dict())  # which goes on as it was


def test_a_network_without_an_adapter_has_none_to_export(tmp_path):
    with pytest.raises(ValueError, match="`format` must be another than 'lora' for a network"):
        export(DiffusionModule(small_unet()), tmp_path / "lora", "lora")
