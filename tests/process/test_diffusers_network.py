"""A network from a folder of diffusers is the one that was saved; what is none is one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.diffusers_networks import tiny
from support.networks import small_unet

from lightning_vr import Pretrained
from lightning_vr.lifecycle.configuration import describe

WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = ["UNet", "conditional UNet", "DiT", "PixArt", "SD3", "Flux"]


@pytest.fixture
def pipeline(tmp_path):
    """A folder as a pipeline has one, with a network, an autoencoder and a scheduler."""
    small_unet().save_pretrained(tmp_path / "unet")
    for name, kind in {"vae": "AutoencoderKL", "scheduler": "DDPMScheduler"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": kind}))
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_network_comes_back_bitwise(kind, dtype, tmp_path):
    saved = tiny(kind).to(getattr(torch, dtype))
    saved.save_pretrained(tmp_path)

    loaded = Pretrained(str(tmp_path), dtype=dtype)

    assert type(loaded) is type(saved)
    assert describe(loaded) == describe(saved)  # settings and dtype
    found, expected = loaded.state_dict(), saved.state_dict()
    assert found.keys() == expected.keys()
    assert all(x.dtype == expected[name].dtype for name, x in found.items())
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    assert loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_network_of_32_bits_can_be_loaded_in_16(tmp_path):
    saved = small_unet()
    saved.save_pretrained(tmp_path)
    loaded = Pretrained(tmp_path, dtype="bfloat16").state_dict()
    assert all(torch.equal(loaded[k], v.bfloat16()) for k, v in saved.state_dict().items())


def test_weights_in_several_files_or_of_a_variant_are_found(tmp_path):
    saved = small_unet()
    saved.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    saved.save_pretrained(tmp_path / "variant", variant="fp16")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for options in ({"path": "shards"}, {"path": "variant", "variant": "fp16"}):
        options["path"] = tmp_path / options["path"]
        loaded = Pretrained(**options).state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in saved.state_dict().items())


def refusal(*args, **options):
    with pytest.raises(ValueError, match=r"^`\w+` must be .*[^\n]+$") as error:
        Pretrained(*args, **options)
    return str(error.value)


def test_a_folder_that_is_none_or_holds_no_network_is_refused(pipeline, tmp_path):
    assert "there is no folder nonesuch: correct it" in refusal("nonesuch")
    assert "there is no folder" in refusal("runwayml/stable-diffusion-v1-5")
    for subfolder in (None, "nonesuch"):
        line = refusal(pipeline, subfolder)
        assert f"which has scheduler, unet, vae, got {subfolder!r}: name" in line
    (tmp_path / "empty").mkdir()
    assert "has no config.json: name the folder" in refusal(tmp_path / "empty")
    assert "takes timesteps, but" in refusal(pipeline, "vae")
    assert "holds a AutoencoderKL" in refusal(pipeline, "vae")
    assert "holds a DDPMScheduler" in refusal(pipeline, "scheduler")
    assert "`dtype` must be 'float32', 'bfloat16'" in refusal(pipeline, "unet", dtype="int8")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"_class_name": "os.system"}', "holds a os.system"),
        ('{"_class_name": "nonesuch"}', "holds a nonesuch"),
        ('{"_class_name": "logging"}', "holds a logging"),
        ("{}", "holds a None"),
        ("[]", "holds no settings"),
        ("{", "holds no settings (Expecting property name"),
    ],
)
def test_settings_that_name_no_network_are_refused(config, words, pipeline):
    (pipeline / "unet/config.json").write_text(config)
    assert words in refusal(pipeline, "unet")


def test_weights_that_are_not_all_there_are_refused(pipeline):
    file = pipeline / "unet" / WEIGHTS
    weights = load_file(file)
    bias = weights.pop("conv_in.bias")
    save_file(weights, file)
    assert "lacks conv_in.bias" in refusal(pipeline, "unet")
    save_file(weights | {"conv_in.bias": bias, "more": bias.clone()}, file)
    assert "has more too" in refusal(pipeline, "unet")
    save_file(weights | {"conv_in.bias": torch.zeros(3)}, file)
    assert "size mismatch for conv_in.bias" in refusal(pipeline, "unet")
    file.write_bytes(file.read_bytes()[:2000])
    assert "does not load" in refusal(pipeline, "unet")
    file.unlink()
    torch.save(small_unet().state_dict(), file.with_suffix(".bin"))
    assert "does not load" in refusal(pipeline, "unet")
