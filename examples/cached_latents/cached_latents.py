"""Encode digits once, and train a latent diffusion model from the cache.

Digits of 32 x 32 pixels and a small ``AutoencoderKL``, which is trained first and then frozen. The
script measures the seconds of a training step that encodes pictures and of one that reads their
latents from disk, in turn, and the K that ``CARV("auto")`` takes in each. It then trains from the
cache, and decodes samples.

    python examples/cached_latents/cached_latents.py

What it writes is in ``runs/cached_latents``: the autoencoder, the cache, a checkpoint and a
picture. A run that was stopped while it encoded goes on where it was.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.nn.functional import interpolate, mse_loss
from torch.utils.data import DataLoader

from lightning_vr import CARV, AutoencoderFolder, LatentDiffusionModule, cache_latents
from lightning_vr.callbacks.pictures import save_picture
from lightning_vr.data import CachedLatents, Digits, InMemoryDataset
from lightning_vr.estimators.draws import Draws

LATENT_SPREAD = 0.5


class LargeDigits(Digits):
    """The digits, enlarged to 32 x 32 pixels.

    Args:
        most: At most so many for training, and as many for validation.
        **settings: Of ``Digits``.
    """

    def __init__(self, most: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.most = most

    def build_datasets(self) -> tuple[InMemoryDataset, InMemoryDataset]:
        train, validation = super().build_datasets()
        return self._enlarged(train), self._enlarged(validation)

    def _enlarged(self, part: InMemoryDataset) -> InMemoryDataset:
        images = interpolate(part.x[: self.most], size=32, mode="bicubic").clamp(-1, 1)
        return self._dataset(images, part.label[: self.most])


def train_autoencoder(data: Digits, steps: int, width: int, folder: Path) -> None:
    """Train a small autoencoder by reconstruction and a little KL, and save it."""
    model = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[width, width, 2 * width],
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    loader = DataLoader(data.train_dataset, batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    batches = (batch for _ in range(steps) for batch in loader)
    for _, batch in zip(range(steps), batches, strict=False):
        posterior = model.encode(batch["image"]).latent_dist
        error = mse_loss(model.decode(posterior.sample()).sample, batch["image"])
        loss = error + 1e-5 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        spread = model.encode(data.train_dataset.x[:256]).latent_dist.sample().std()
    print(f"autoencoder: squared error {float(error.detach()):.4f} of pixels in [-1, 1]")
    model.register_to_config(scaling_factor=LATENT_SPREAD / float(spread))
    model.save_pretrained(folder)


def build(
    options: argparse.Namespace, steps: int, draws: Draws | None = None
) -> LatentDiffusionModule:
    network = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=[options.width, 2 * options.width],
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D"],
        num_class_embeds=11,
    )
    return LatentDiffusionModule(
        network,
        AutoencoderFolder(str(options.folder / "autoencoder")),
        num_classes=10,
        draws=draws,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        lr_scheduler=partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=2e-3, total_steps=steps + 1
        ),
    )


def trainer(steps: int, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


def batches(data: LightningDataModule) -> Iterator[Any]:
    while True:
        yield from data.train_dataloader()


def step_seconds(
    module: LatentDiffusionModule, sources: dict[str, LightningDataModule], rounds: int
) -> dict[str, float]:
    """Return the median seconds to load a batch and train on it, of sources that take turns."""
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=0.0)
    streams = {name: batches(data) for name, data in sources.items()}
    found: dict[str, list[float]] = {name: [] for name in sources}
    for step in range(rounds + 1):
        for name, stream in streams.items():
            start = time.perf_counter()
            module.loss(next(stream), module.generator("timing", step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--vae_steps", type=int, default=400)
    parser.add_argument("--vae_width", type=int, default=16)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path("runs/cached_latents"))
    parser.add_argument("--quick", action="store_true", help="a few digits and steps")
    options = parser.parse_args()
    if options.quick:
        options.steps = options.vae_steps = options.rounds = 2
    seed_everything(0, verbose=False)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    folder = options.folder
    size = 16 if options.quick else 64
    pictures = LargeDigits(2 * size if options.quick else None, batch_size=size)
    pictures.setup()

    if not (folder / "autoencoder").exists():
        train_autoencoder(pictures, options.vae_steps, options.vae_width, folder / "autoencoder")
    module = build(options, options.steps)
    start = time.perf_counter()
    cache_latents(module, pictures, folder / "cache", batch_size=64, trainer=trainer(-1))
    written = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    print(f"cache: {written / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s")

    latents = CachedLatents(str(folder / "cache"), batch_size=size)
    latents.setup()
    sources = {"encoded": pictures, "cached": latents}
    seconds = step_seconds(module, sources, options.rounds)
    ratio = seconds["encoded"] / seconds["cached"]
    print(f"sigma_data of the latents: {latents.sigma_data:.3f}")
    for name, median in seconds.items():
        print(f"a step, {name}: {1000 * median:.1f} ms")
    print(f"ratio: {ratio:.2f}")
    for name, data in sources.items():
        chosen = build(options, 2, CARV("auto"))
        trainer(2).fit(chosen, data)
        print(f'CARV("auto"), {name}: K = {chosen.draws.draws_per_sample}')

    trainer(options.steps).fit(module, latents)
    print(f"training from the cache: loss {float(module.estimate.loss):.3f}")
    x0 = module.sample(40, group=torch.arange(40) % 10, seed=0)
    save_picture(module.decode(x0), folder / "samples.png", columns=10)
    print(f"samples: {folder / 'samples.png'}")


if __name__ == "__main__":
    main()
