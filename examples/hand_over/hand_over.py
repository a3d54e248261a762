"""A model of the digits goes to diffusers: trained, exported, sampled without this package.

    python examples/hand_over/hand_over.py --prediction velocity --steps 300
    python examples/hand_over/hand_over.py --ckpt_path FILE.ckpt

The samples of both sides begin with the same noise, and the largest difference is printed.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import diffusers
import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file

from lightning_vr import (
    EDM,
    Cosine,
    DiffusersSolver,
    DiffusionModule,
    Euler,
    RectifiedFlow,
    Sampler,
    export,
)
from lightning_vr.data import Digits

STEPS, COUNT, SEED = 20, 10, 0
SCHEDULES = {"edm": EDM, "velocity": RectifiedFlow, "v": Cosine}
WITH_DIFFUSERS_ALONE = """
import sys
import torch
from safetensors.torch import save_file

sys.modules["lightning_vr"] = None  # importing it would raise
from diffusers import DiffusionPipeline

folder, count, steps, seed = sys.argv[1], *map(int, sys.argv[2:])
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
asked = {"num_inference_steps": steps, "output_type": "pt"}
if getattr(pipeline.config, "num_classes", None):
    asked["class_labels"] = [i % pipeline.config.num_classes for i in range(count)]
pictures = pipeline(count, generator=torch.Generator().manual_seed(seed), **asked).images
save_file({"pictures": pictures}, f"{folder}/samples.safetensors")
row = torch.cat(list(pictures[:, 0]), dim=1).repeat_interleave(4, 0).repeat_interleave(4, 1)
pipeline.numpy_to_pil(row[..., None].numpy())[0].save(f"{folder}/samples.png")
print(f"sampled by a {type(pipeline).__name__} with a {type(pipeline.scheduler).__name__}")
"""


def train(prediction: str, steps: int) -> DiffusionModule:
    """Return a model of the digits; pictures without classes are what a stock pipeline samples."""
    seed_everything(SEED)
    has_classes = prediction == "edm"
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=11 if has_classes else None,
    )
    module = DiffusionModule(
        network,
        schedule=SCHEDULES[prediction](),
        prediction=prediction,
        sigma_data=0.75,
        num_classes=10 if has_classes else None,
        label_dropout=0.1 if has_classes else 0.0,
    )
    trainer = Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, limit_val_batches=0
    )
    trainer.fit(module, Digits())
    return module


def sampler_of(module: DiffusionModule) -> Sampler:
    """Return the sampler whose noise levels are those of the exported scheduler."""
    scheduler = module.to_pipeline().scheduler
    scheduler.set_timesteps(STEPS)
    if isinstance(module.schedule, EDM):
        return Sampler(Euler(), STEPS)
    if isinstance(module.schedule, RectifiedFlow):
        return Sampler(DiffusersSolver(scheduler), STEPS)  # begins where noise is all there is
    return Given(scheduler.timesteps.double() / 1000)


class Given(Sampler):
    """Euler's method at given times, which is DDIM."""

    def __init__(self, times: torch.Tensor) -> None:
        super().__init__(Euler(), len(times))
        object.__setattr__(self, "times", times)

    def noise_levels(self, schedule: torch.nn.Module) -> torch.Tensor:
        return schedule.noise_level(self.times)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_path", help="a checkpoint of the digits, in place of training")
    parser.add_argument("--prediction", choices=SCHEDULES, default="velocity")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", default="handed_over")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps = 2

    if options.ckpt_path:
        module = DiffusionModule.load_from_checkpoint(options.ckpt_path)
    else:
        module = train(options.prediction, options.steps)
    export(module, options.folder)
    sizes = [options.folder, str(COUNT), str(STEPS), str(SEED)]
    subprocess.run([sys.executable, "-c", WITH_DIFFUSERS_ALONE, *sizes], check=True)

    labels = None if module.num_classes is None else [i % module.num_classes for i in range(COUNT)]
    source = torch.Generator().manual_seed(SEED)
    here = module.sample(COUNT, group=labels, sampler=sampler_of(module), source=source)
    there = load_file(Path(options.folder) / "samples.safetensors")["pictures"]
    difference = ((here / 2 + 0.5).clamp(0, 1) - there).abs().max()
    print(f"largest difference from `module.sample`: {float(difference):.1e}")


if __name__ == "__main__":
    main()
