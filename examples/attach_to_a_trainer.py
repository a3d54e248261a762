"""Attach the callbacks to a trainer that knows nothing of lightning_vr.

A denoising diffusion model as people write it in Lightning, on real digits. ``TargetVariance``
needs the schedule and a function that turns a batch into clean samples. ``GradientVariance``
measures totals without arguments, and splits them by source if it is given the loss of each sample.
``Convergence`` says by the same loss at which noise levels the module has learned what there is.
``SampleGrid`` and ``FrechetDistance`` need a function that samples from the module.

    python examples/attach_to_a_trainer.py --max_epochs 20

The results are in ``runs/attach``.
"""

import argparse

import torch
from diffusers import UNet2DModel
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_vr import (
    VP,
    Convergence,
    FrechetDistance,
    GradientVariance,
    SampleGrid,
    Sampler,
    TargetVariance,
)
from lightning_vr.data import Digits
from lightning_vr.metrics import DigitFeatures

SCHEDULE = VP()


class Denoiser(LightningModule):
    """Predicts the noise, with plain denoising score matching."""

    def __init__(self) -> None:
        super().__init__()
        blocks = {
            "down_block_types": ["DownBlock2D"] * 2,
            "up_block_types": ["UpBlock2D"] * 2,
            "block_out_channels": [16, 32],
        }
        self.network = UNet2DModel(8, 1, 1, layers_per_block=1, norm_num_groups=8, **blocks)

    def forward(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.network(xt, 1000 * t).sample

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.mean_squared_error(batch["image"])

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.mean_squared_error(batch["image"]))

    def mean_squared_error(self, x0: torch.Tensor) -> torch.Tensor:
        t = torch.rand(len(x0), device=x0.device)
        noise = torch.randn_like(x0)
        return torch.nn.functional.mse_loss(self(SCHEDULE.perturb(x0, noise, t), t), noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def loss(module: Denoiser, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the training loss of each sample."""
    predicted = module(SCHEDULE.perturb(x0, noise, t), t)
    return (predicted - noise).square().flatten(1).mean(dim=1)


def sample(module: Denoiser, count: int) -> torch.Tensor:
    """Solve the probability-flow ODE of the module's own noise predictions."""

    def denoiser(xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = SCHEDULE.alpha(t)[0], SCHEDULE.sigma(t)[0]
        return (xt - sigma * module(xt, t)) / alpha

    noise = torch.randn(count, 1, 8, 8, device=module.device)
    return Sampler(steps=12).solve(denoiser, SCHEDULE, noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--folder", default="runs")
    options = parser.parse_args()

    seed_everything(0)
    trainer = Trainer(
        max_epochs=options.max_epochs,
        check_val_every_n_epoch=max(1, options.max_epochs // 4),
        log_every_n_steps=11,
        logger=CSVLogger(options.folder, name="attach"),
        callbacks=[
            TargetVariance(schedule=SCHEDULE, clean=lambda batch: batch["image"]),
            GradientVariance(every_n_steps=10, loss=loss, schedule=SCHEDULE),
            Convergence(samples=32, loss=loss, schedule=SCHEDULE),
            SampleGrid(samples=64, sample=sample),
            FrechetDistance(
                DigitFeatures(),
                samples=options.samples,
                sample=sample,
                clean=lambda batch: batch["image"],
            ),
        ],
    )
    trainer.fit(Denoiser(), datamodule=Digits())


if __name__ == "__main__":
    main()
