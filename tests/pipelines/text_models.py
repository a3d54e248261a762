"""Models of latents of pictures that are conditioned on one of two words."""

import torch
from diffusers import DDIMScheduler
from round_trips import AtLevels
from support.diffusers_networks import tiny
from support.latents import save_autoencoder
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader

from lightning_vr import AutoencoderFolder, Euler, LatentDiffusionModule

WORDS = ["one", "two"]
STEPS = 5
TABLE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
V = {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "trailing"}
V |= {"steps_offset": 1}


class OfText(LatentDiffusionModule):
    """Latents of pictures that are conditioned on one of two words."""

    def encode_condition(self, rows):
        numbers = torch.tensor([WORDS.index(text) for text in rows["prompt"]])
        return {"encoder_hidden_states": embedded(numbers)}


def embedded(numbers):
    return torch.eye(2).repeat(1, 3)[numbers][:, None].expand(-1, 3, -1)


def of_text(folder, **options):
    settings = {"schedule": DDIMScheduler(**TABLE, **V), "prediction": "v"}
    settings |= {"cond_dropout": 0.1, "null_cond": "zeros"}
    save_autoencoder(folder / "vae")
    autoencoder = AutoencoderFolder(str(folder / "vae"))
    return OfText(tiny("conditional UNet"), autoencoder, **(settings | options))


def fitted(module):
    """Train two steps on pictures with labels and prompts."""
    pictures = 0.5 * torch.randn(16, 1, 8, 8)
    data = [{"image": x, "label": i % 3, "prompt": WORDS[i % 2]} for i, x in enumerate(pictures)]
    loader = DataLoader(data, batch_size=8)
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(module, loader, loader)
    return module


def at_levels_of(scheduler, module, guidance):
    scheduler.set_timesteps(STEPS)
    levels = module.schedule.noise_level(scheduler.timesteps.double())
    return AtLevels(Euler(), STEPS, levels=levels, guidance=guidance)


def pictures_of(module, scheduler, noise_seed):
    """Return guided samples of two prompts at the steps of a scheduler, as pictures in [0, 1]."""
    source = torch.Generator().manual_seed(noise_seed)
    sampler = at_levels_of(scheduler, module, guidance=3.0)
    cond = module.encode_condition({"prompt": WORDS})
    return module.decode(module.sample(2, cond=cond, sampler=sampler, source=source)) / 2 + 0.5
