"""Frozen autoencoders of diffusers as encoders and decoders of latents."""

import copy

import diffusers
import pytest
import torch
from support.latents import save_autoencoder

from lightning_vr.process import Autoencoder, AutoencoderFolder

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
SCALES = {
    "scaling": ({}, 0.0, 1.5),
    "shift": ({"shift_factor": 0.25}, 0.25, 1.5),
    "channels": (
        {"latents_mean": [0.5, -1.0], "latents_std": [2.0, 0.5]},
        torch.tensor([0.5, -1.0]).reshape(1, 2, 1, 1),
        torch.tensor([0.75, 3.0]).reshape(1, 2, 1, 1),
    ),
}


@pytest.fixture
def folder(tmp_path):
    save_autoencoder(tmp_path / "vae")
    return AutoencoderFolder(str(tmp_path), "vae")


@pytest.mark.parametrize(("options", "shift", "scale"), SCALES.values(), ids=SCALES)
def test_latents_and_pictures_are_those_of_diffusers_scaled(tmp_path, options, shift, scale):
    model = save_autoencoder(tmp_path, **options)
    own = Autoencoder(AutoencoderFolder(str(tmp_path)))
    mean, std = own.moments(IMAGES)
    with torch.no_grad():
        posterior = model.encode(IMAGES).latent_dist
        noise = torch.randn(mean.shape)
        latents = (posterior.mean + posterior.std * noise - shift) * scale
        torch.testing.assert_close(mean + std * noise, latents)
        pictures = model.decode(latents / scale + shift).sample
        torch.testing.assert_close(own.decode(latents), pictures.clamp(-1, 1))


def test_large_pictures_are_encoded_and_decoded_in_the_tiles_of_diffusers(tmp_path):
    model = save_autoencoder(tmp_path)
    model.enable_tiling()
    own = Autoencoder(AutoencoderFolder(str(tmp_path), tiling=True))
    images = IMAGES.repeat(1, 1, 2, 2)
    mean, _ = own.moments(images)
    with torch.no_grad():
        torch.testing.assert_close(mean, model.encode(images).latent_dist.mean * 1.5)
        pictures = model.decode(mean / 1.5).sample.clamp(-1, 1)
    torch.testing.assert_close(own.decode(mean), pictures)


def test_it_is_frozen_and_in_no_state_and_keeps_mode_and_dtype(folder):
    module = torch.nn.ModuleDict({"vae": Autoencoder(folder)})
    before = module["vae"].moments(IMAGES)[0]
    again = copy.deepcopy(module).train().to(torch.bfloat16)
    assert again["vae"]._shared is module["vae"]._shared
    assert not list(again.parameters())
    assert not again.state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again["vae"].moments(IMAGES)[0], before)
    assert not again["vae"].decode(before.requires_grad_()).requires_grad


def test_its_digest_tells_weights_scales_and_dtypes_apart(tmp_path, folder):
    digests = {Autoencoder(folder).digest}
    save_autoencoder(tmp_path / "again")
    assert {Autoencoder(AutoencoderFolder(str(tmp_path / "again"))).digest} == digests
    digests.add(Autoencoder(AutoencoderFolder(str(tmp_path), "vae", "bfloat16")).digest)
    for name, options in {"seed": {"seed": 1}, "scale": {"scaling_factor": 2.0}}.items():
        save_autoencoder(tmp_path / name, **options)
        digests.add(Autoencoder(AutoencoderFolder(str(tmp_path / name))).digest)
    assert len(digests) == 4


def test_what_is_no_autoencoder_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"`path` must be a folder.*Nothing is downloaded"):
        Autoencoder(AutoencoderFolder("stabilityai/sd-vae"))
    with pytest.raises(ValueError, match="`subfolder` must be"):
        Autoencoder(AutoencoderFolder(str(tmp_path)))
    diffusers.AutoencoderTiny(1, 1).save_config(tmp_path / "tiny")
    with pytest.raises(ValueError, match="must be the folder of an AutoencoderKL"):
        Autoencoder(AutoencoderFolder(str(tmp_path / "tiny")))
    weights = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="weights of a network as safetensors"):
        Autoencoder(folder)
    save_autoencoder(tmp_path / "both", shift_factor=1.0, latents_mean=[0.0, 0.0])
    with pytest.raises(ValueError, match="a `shift_factor` or a `latents_mean`"):
        Autoencoder(AutoencoderFolder(str(tmp_path / "both")))
    with pytest.raises(ValueError, match="`posterior` must be 'sample' or 'mean'"):
        AutoencoderFolder("vae", posterior="mode")


def test_pictures_of_other_channels_are_refused(folder):
    with pytest.raises(ValueError, match=r"takes pictures \(B, 1, H, W\), got \(3, 3, 8, 8\)"):
        Autoencoder(folder).moments(IMAGES.expand(3, 3, 8, 8))
