"""Small U-Nets of digits, trained once for all rows, and how their samples are judged.

Models of one seed start from the same weights and see the same batches, times and noise, whatever
their target is: differences between them are taken in pairs.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DModel
from study import Study
from torch import Tensor

from lightning_vr import EDM, STF, VE, VP, Diffusion, LogNormal, LogUniform, Sampler
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.data import Digits, digits
from lightning_vr.estimators.targets import DSM, Target
from lightning_vr.metrics import DigitFeatures, FrechetMetric
from lightning_vr.process import Density, Schedule
from lightning_vr.process.predictions import PredictionType

BATCH, DECAY, LEARNING_RATE = 64, 0.99, 2e-3
STEPS = (50, 100, 200, 400, 800)
"""Steps at which weights are kept."""


@dataclass(frozen=True)
class Job:
    """How a model is trained.

    Attributes:
        schedule: Makes its schedule.
        target: Makes its target.
        prediction: What the network predicts.
        timesteps: Density of the noise level, or None for the schedule's own.
        steps: Steps of training, unless a row asks for more.
    """

    schedule: Callable[[], Schedule]
    target: Callable[[], Target] = DSM
    prediction: PredictionType = "edm"
    timesteps: Density | None = None
    steps: int = STEPS[-1]

    def build(self) -> Diffusion:
        """Return the model, with new weights."""
        return Diffusion(
            unet(),
            self.schedule(),
            self.prediction,
            self.timesteps,
            target=self.target(),
            sigma_data=0.75,
        )


JOBS = {
    "ve, n = 1": Job(VE),
    "ve, n = 16": Job(VE, partial(STF, 16)),
    "ve, n = all": Job(VE, partial(STF, "all")),
    "vp, n = 1": Job(VP, prediction="epsilon", steps=200),
    "vp, n = all": Job(VP, partial(STF, "all"), "epsilon", steps=200),
    "edm, n = 1": Job(EDM),
    "bell, n = 1": Job(EDM, steps=400),
    "flat, n = 1": Job(EDM, timesteps=LogUniform(0.002, 80), steps=400),
    "low, n = 1": Job(EDM, timesteps=LogNormal(-3.6), steps=400),
    "high, n = 1": Job(EDM, timesteps=LogNormal(1.2), steps=400),
}


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=[32, 64],
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2,
    )


def training_images() -> Tensor:
    rows = Digits().build_datasets()[0]
    return torch.stack([rows[i]["image"] for i in range(len(rows))])


def model(name: str, seed: int, step: int, study: Study) -> tuple[Diffusion, float]:
    """Return a model with averaged weights after so many steps, and the seconds it took."""
    if not path_of(name, seed, step, study).exists():
        study.check_time()
        train(name, seed, max(step, JOBS[name].steps), study)
    kept = torch.load(path_of(name, seed, step, study), weights_only=True)
    found = JOBS[name].build()
    found.load_state_dict(kept["weights"])
    found.sample_shape = (1, 8, 8)
    return found, kept["seconds"]


def path_of(name: str, seed: int, step: int, study: Study) -> Path:
    return study.folder / f"{name.replace(', n = ', '_')}_{seed}_{step}.pt"


def train(name: str, seed: int, steps: int, study: Study) -> None:
    """Train a model and keep its averaged weights on the way."""
    kept = (2, 4) if study.is_quick else STEPS
    torch.manual_seed(seed)
    trained = JOBS[name].build()
    images = training_images()
    trained.target.fill(images, None, indexed=True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE)
    averaged, started = copy.deepcopy(trained), time.process_time()
    for step in range(1, min(steps, kept[-1]) + 1):
        rows = torch.randint(len(images), (BATCH,), generator=generator(seed, "batch", step))
        batch = {"image": images[rows], "index": rows}
        loss = trained.loss(batch, generator(seed, "train", step)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        update_average(averaged, trained, min(DECAY, (1 + step) / (10 + step)))
        if step in kept:
            state = {"weights": averaged.state_dict(), "seconds": time.process_time() - started}
            torch.save(state, path_of(name, seed, step, study))


@torch.no_grad()
def update_average(averaged: torch.nn.Module, now: torch.nn.Module, decay: float) -> None:
    for mean, new in zip(averaged.parameters(), now.parameters(), strict=True):
        mean.lerp_(new, 1 - decay)


def frechet(judged: Diffusion, sampler: Sampler, count: int, seed: int) -> float:
    """Return the Fréchet distance of so many samples to all digits, in digit features."""
    metric = FrechetMetric(DigitFeatures())
    metric.update(digits()[0], real=True)
    metric.update(judged.sample(count, sampler=sampler, seed=seed).clamp(-1, 1), real=False)
    return float(metric.compute())


def clean_digits(count: int, key: str) -> Clean:
    """Return so many training digits, drawn without replacement."""
    images = training_images()
    rows = torch.randperm(len(images), generator=generator(key))[:count]
    return Clean(images[rows], index=rows)
