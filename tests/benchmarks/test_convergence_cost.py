"""Convergence at its default cadence: what it costs beside the training steps between."""

import math

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

from lightning_vr import ConvergenceMonitor
from lightning_vr.data.digits import digits

BATCH_SIZE = 128
SCHEDULER = DDPMScheduler()


def loss(model, x0, noise, t):
    predicted = model(SCHEDULER.add_noise(x0, noise, t.long()), t).sample
    return (predicted - noise).square().flatten(1).mean(dim=1)


def test_a_validation_against_the_training_steps_that_it_is_made_once_in(compare):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    model = UNet2DModel(8, 1, 1, block_out_channels=[32, 64], layers_per_block=1, **blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = digits()[0]
    monitor = ConvergenceMonitor(images[:1437], images[1437:], loss=loss, schedule=SCHEDULER)
    monitor.measure(0, model)  # the optimum is computed once

    def step():
        clean = images[:BATCH_SIZE]
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (BATCH_SIZE,))
        F.mse_loss(model(SCHEDULER.add_noise(clean, noise, t), t).sample, noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    ours, other = compare(
        lambda: monitor.measure(1, model),
        step,
        rounds=8,
        label="a validation of Convergence and a training step",
    )
    draws = 2 * 12 * 128
    every = math.ceil(draws / (2.5 * BATCH_SIZE) / 0.02)  # what the callback chooses
    print(f"one in {every} steps: {100 * ours / other / every:.2f} % of the training time")
