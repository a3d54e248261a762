"""Watch a training loop that knows nothing of lightning_vr: does it learn, and where?

The loop is that of diffusers' ``train_unconditional.py`` (a U-Net, ``DDPMScheduler``, noise, mean
squared error) in plain torch, on real digits. Three lines are added to it: they make the monitor,
call it in the loop and print its sentences. ``--check`` trains without them too, and compares the
weights bit by bit.

    python examples/convergence/watch_a_loop.py --steps 200 --every 50 --check
    python examples/convergence/watch_a_loop.py --quick
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

from lightning_vr import ConvergenceMonitor
from lightning_vr.callbacks.convergence_report import draw
from lightning_vr.data.digits import digits

SCHEDULER = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
HELD_OUT = 360


def loss(
    model: UNet2DModel, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Return the squared error of each sample, as the loop has it for the batch."""
    t = t.long()
    predicted = model(SCHEDULER.add_noise(x0, noise, t), t).sample
    return (predicted - noise).square().flatten(1).mean(dim=1)


def train(steps: int, monitor: ConvergenceMonitor | None, images: torch.Tensor) -> UNet2DModel:
    """Train as the script does; the monitor is one line of it."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    shape = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8}
    model = UNet2DModel(8, 1, 1, **shape, **blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        if monitor is not None:
            monitor.update(step, model)
        clean_images = images[torch.randint(len(images), (128,))]
        noise = torch.randn_like(clean_images)
        timesteps = torch.randint(0, 1000, (len(clean_images),))
        noisy_images = SCHEDULER.add_noise(clean_images, noise, timesteps)
        model_output = model(noisy_images, timesteps).sample
        F.mse_loss(model_output, noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--check", action="store_true", help="compare with a loop without it")
    parser.add_argument("--quick", action="store_true", help="a few steps and draws")
    parser.add_argument("--folder", type=Path, default=Path("runs/watch_a_loop"))
    options = parser.parse_args()

    images, _ = digits()
    steps, settings = options.steps, {"every_n_steps": options.every}
    if options.quick:
        steps, settings = 6, {"every_n_steps": 3, "samples": 16, "noise_levels": 4}
    train_set, held_out = images[:-HELD_OUT], images[-HELD_OUT:]
    monitor = ConvergenceMonitor(train_set, held_out, loss=loss, schedule=SCHEDULER, **settings)
    model = train(steps, monitor, train_set)
    monitor.measure(steps, model)
    print(monitor.summary())

    options.folder.mkdir(parents=True, exist_ok=True)
    assert monitor.floors is not None
    draw(monitor.floors, monitor.records, options.folder / "convergence.png")
    if options.check:
        plain = train(steps, None, train_set)
        same = [
            torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
        ]
        print(f"The weights are bitwise those of the loop without it: {all(same)}")


if __name__ == "__main__":
    main()
