"""A network of the digits 0 to 4 learns 5 to 9 by an adapter, which goes to diffusers.

    python examples/adapters/adapt_digits.py

writes ``runs/adapters``: the folder ``base`` of the network, which any other program of diffusers
could have written, the folder ``lora`` of the adapter, and pictures of samples before and after.
"""

import argparse
import functools
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure
from named_digits import NamedDigits
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_vr import EMA, Euler, Sampler, export
from lightning_vr.data import Digits
from lightning_vr.training.adapters import LoRA

KNOWN, NEW = range(5), range(5, 10)
SAMPLER = Sampler(Euler(), 20)  # the steps of the scheduler that goes out
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_checkpointing": False, "enable_model_summary": False}
WITH_DIFFUSERS_ALONE = """
import sys
from safetensors.torch import load_file, save_file

sys.modules["lightning_vr"] = None  # importing it would raise
from diffusers import DiffusionPipeline

base, lora, exchanged, steps = sys.argv[1:]
given = load_file(exchanged)
pipeline = DiffusionPipeline.from_pretrained(base, trust_remote_code=True)
pipeline.unet.load_lora_adapter(lora, prefix="unet", use_safetensors=True)
cond = {"encoder_hidden_states": given["tokens"]}
found = pipeline(len(given["noise"]), cond=cond, latents=given["noise"], output_type="pt",
                 num_inference_steps=int(steps)).images
save_file({"pictures": found}, exchanged)
print(f"sampled by a {type(pipeline).__name__} with a {type(pipeline.unet).__name__}")
"""


def network() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=10,
        attention_head_dim=8,
    )


def trainer(steps: int, *callbacks: object, decay: float | None = None) -> Trainer:
    """Return a trainer that averages weights, by default over a sixth of its steps."""
    average = EMA(decay=max(0.0, 1 - 6 / steps) if decay is None else decay)
    return Trainer(max_steps=steps, limit_val_batches=0, callbacks=[average, *callbacks], **QUIET)


def train_base(folder: Path, steps: int) -> None:
    """Train a network of the known digits, and write it to a folder of diffusers."""
    seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=2e-3)
    module = NamedDigits(network(), sigma_data=0.75, optimizer=optimizer, sampler=SAMPLER)
    trainer(steps).fit(module, Digits(64, classes=KNOWN))
    export(module, folder)


def adapted(folder: Path, **settings: object) -> NamedDigits:
    """Return the network of a folder with a new adapter."""
    optimizer = functools.partial(torch.optim.AdamW, lr=3e-3)
    settings = {"optimizer": optimizer, "sampler": SAMPLER, "adapter": LoRA(4), **settings}
    return NamedDigits.from_pretrained(folder, **settings)


def held_out_loss(module: NamedDigits, classes: range) -> float:
    """Return the plain denoising loss of held-out digits, with the same noise each time."""
    data = Digits(200, classes=classes)
    return Trainer(**QUIET).validate(module, data, verbose=False)[0]["val/loss"]


def samples(module: NamedDigits, digits: Tensor) -> Tensor:
    cond = module.encode_condition({"digit": digits.tolist()})
    source = torch.Generator().manual_seed(0)
    return module.sample(len(digits), cond=cond, source=source)


def of_diffusers(module: NamedDigits, digits: Tensor, base: Path, folder: Path) -> Tensor:
    """Return what stock diffusers samples with the adapter, in a process without this package."""
    shutil.rmtree(folder / "lora", ignore_errors=True)  # of an earlier run
    export(module, folder / "lora", "lora")
    noise = torch.randn(len(digits), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = module.encode_condition({"digit": digits.tolist()})["encoder_hidden_states"]
    exchanged = folder / "exchanged.safetensors"
    save_file({"noise": noise, "tokens": tokens}, exchanged)
    paths = [str(base), str(folder / "lora"), str(exchanged), str(SAMPLER.steps)]
    subprocess.run([sys.executable, "-c", WITH_DIFFUSERS_ALONE, *paths], check=True)
    return load_file(exchanged)["pictures"]


def draw(rows: dict[str, Tensor], path: Path) -> None:
    """Draw a row of pictures for each name."""
    figure = Figure(figsize=(10, 1.2 * len(rows)), layout="constrained")
    for i, (name, pictures) in enumerate(rows.items()):
        axes = figure.add_subplot(len(rows), 1, i + 1)
        axes.imshow(torch.cat(list(pictures[:, 0]), dim=1).clamp(-1, 1).numpy(), cmap="gray_r")
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.base_steps = options.steps = 2
    base, digits = options.folder / "base", torch.tensor([5, 6, 7, 8, 9] * 3)
    if not base.exists():
        train_base(base, options.base_steps)

    seed_everything(0, verbose=False)
    module, data = adapted(base), Digits(options.batch_size, classes=NEW)
    counts = [sum(x.numel() for x in module.parameters() if x.requires_grad)]
    counts.append(sum(x.numel() for x in module.parameters()))
    print(f"{counts[0]} of {counts[1]} parameters train, {counts[0] / counts[1]:.1%}")
    losses = [held_out_loss(module, each) for each in (NEW, KNOWN)]
    rows = {"before": samples(module, digits)}
    trainer(options.steps).fit(module, data)
    rows["after"] = samples(module, digits)
    for name, classes, before in zip(("new", "known"), (NEW, KNOWN), losses, strict=True):
        after = held_out_loss(module, classes)
        print(f"validation loss of the {name} digits: {before:.4f} before, {after:.4f} after")

    there = of_diffusers(module, digits, base, options.folder)
    difference = ((rows["after"] / 2 + 0.5).clamp(0, 1) - there).abs().max()
    print(f"largest difference of a pixel from `module.sample`: {float(difference):.1e}")
    draw(rows, options.folder / "samples.png")


if __name__ == "__main__":
    main()
