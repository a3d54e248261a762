"""Teachers from tiny folders of Stable Diffusion's and SD3's layout, against diffusers by hand."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from support.diffusers_networks import condition, tiny
from support.trainers import quiet_trainer
from torch import nn

from lightning_vr import CARV, Clean, FrozenTeacher, ScoreDistillation, ScoreDistillationLoss
from lightning_vr.core.rng import generator
from lightning_vr.data import TwoGaussians
from lightning_vr.estimators.draws import IID

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")

SCALE, SHIFT, GUIDANCE = 0.3, 0.1, 4.0

SCHEDULERS = {
    "v": DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
    "epsilon": PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def autoencoder():
    torch.manual_seed(1)
    own = {"scaling_factor": SCALE, "shift_factor": SHIFT}
    return AutoencoderKL(
        3, 3, block_out_channels=[4], norm_num_groups=4, latent_channels=2, **own
    ).eval()


def save(folder, kind):
    """Write a folder as a pipeline's ``save_pretrained`` does, its text encoder left out."""
    name, network = ("transformer", "SD3") if kind == "flow" else ("unet", "conditional UNet")
    scheduler = SCHEDULERS[kind]
    tiny(network).save_pretrained(folder / name)
    autoencoder().save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline" if kind == "flow" else "StableDiffusionPipeline",
        name: ["diffusers", type(tiny(network)).__name__],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def texts(kind, count):
    """Return a condition and a negative one."""
    given = condition("SD3" if kind == "flow" else "conditional UNet", 2 * count)
    return {k: x[:count] for k, x in given.items()}, {k: x[count:] for k, x in given.items()}


def by_hand(kind, noised, text, negative):
    """Return the guided noise prediction less the noise, as a pipeline of diffusers has it."""
    network = tiny("SD3" if kind == "flow" else "conditional UNet").eval()
    scheduler, xt = SCHEDULERS[kind], noised.xt
    wide = (-1, 1, 1, 1)
    with torch.no_grad():
        if kind == "flow":
            sigma = noised.sigma.view(wide)
            velocities = [network(xt, timestep=1000 * noised.sigma, **x) for x in (text, negative)]
            eps = [xt + (1 - sigma) * v.sample for v in velocities]
        else:
            t = (noised.alpha[:, None] ** 2 - scheduler.alphas_cumprod).abs().argmin(dim=1)
            torch.testing.assert_close(xt, scheduler.add_noise(noised.x0, noised.noise, t))
            outputs = [network(xt, t, **x).sample for x in (text, negative)]
            alpha, sigma = noised.alpha.view(wide), noised.sigma.view(wide)
            eps = [alpha * v + sigma * xt for v in outputs] if kind != "epsilon" else outputs
    conditional, null = eps
    return null + GUIDANCE * (conditional - null) - noised.noise


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_folder_is_the_teacher_that_its_pipeline_would_be(kind, tmp_path):
    teacher = FrozenTeacher.from_pretrained(save(tmp_path, kind), guidance=GUIDANCE)
    text, negative = texts(kind, 4)
    cond = text | {f"negative_{name}": x for name, x in negative.items()}
    x0 = torch.randn(4, 2, 8, 8, generator=generator("x0"))
    noised = IID()(Clean(x0, cond=cond), teacher.model.objective, generator("draws"))
    found = teacher.noise_residual(noised)
    torch.testing.assert_close(found, by_hand(kind, noised, text, negative), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_images_get_the_gradient_through_the_folders_autoencoder(kind, tmp_path):
    teacher = FrozenTeacher.from_pretrained(save(tmp_path, kind), guidance=GUIDANCE)
    loss = ScoreDistillationLoss(teacher, CARV(2, antithetic=True))
    images = torch.rand(2, 3, 8, 8, generator=generator("images")).requires_grad_()
    text, negative = texts(kind, 1)  # one prompt for all views
    cond = text | {f"negative_{name}": x for name, x in negative.items()}
    estimate = loss(teacher.encode(images), cond=cond)
    (found,) = torch.autograd.grad(estimate.loss, images)
    latents = SCALE * (autoencoder().encode(images).latent_dist.mean - SHIFT)
    (expected,) = torch.autograd.grad(latents, images, estimate.gradient / 2)
    torch.testing.assert_close(found, expected)
    assert float(found.abs().max()) > 0


class Picture(ScoreDistillation):
    def __init__(self, teacher, **settings):
        super().__init__(teacher, **settings)
        self.pixels = nn.Parameter(torch.zeros(1, 3, 8, 8))

    def render(self, batch):
        text, negative = texts("v", 1)
        cond = text | {f"negative_{name}": x for name, x in negative.items()}
        return Clean(self.pixels.expand(2, 3, 8, 8).tanh(), cond=cond)


def test_a_picture_trains_through_a_folder_in_bfloat16_which_no_checkpoint_holds(tmp_path):
    folder = save(tmp_path / "folder", "v")
    teacher = FrozenTeacher.from_pretrained(folder, guidance=GUIDANCE, dtype="bfloat16")
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    module = Picture(teacher, draws=CARV(2))
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(module, TwoGaussians(1, 2, num_samples=4, num_validation=2))
    assert float(module.pixels.detach().abs().min()) > 0
    assert module.pixels.dtype == torch.float32
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if name.startswith("teacher")]
    assert "pixels" in saved
