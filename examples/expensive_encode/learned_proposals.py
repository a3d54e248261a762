"""Measure how much of the gradient's second moment a learned importance sampling of t removes.

    python examples/expensive_encode/learned_proposals.py

For four usual parametrisations on the digits this measures ``E ‖g‖²`` of the parameters' gradient
in 16 equally likely bins of t, and from it what remains of the second moment under three proposals:
the best one, which knows these numbers, and the two that ``LearnedProposal`` learns from every
training step at no further cost. All have a floor of a tenth. It takes three minutes on two cores.
"""

import argparse
import functools
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import UNet2DModel
from lightning.pytorch import Trainer, seed_everything

from lightning_vr import EDM, VE, VP, DiffusionModule, RectifiedFlow
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.data import Digits
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.gradient_measurement import GradientMeasurement

BINS, FLOOR = 16, 0.1

WORKLOADS = {
    "EDM": {"schedule": EDM()},
    "VE, edm": {"schedule": VE()},
    "VP, epsilon": {"schedule": VP(), "prediction": "epsilon"},
    "rectified flow, velocity": {"schedule": RectifiedFlow(), "prediction": "velocity"},
}


def trained(settings: dict[str, Any], steps: int, width: int):
    seed_everything(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=[width, 2 * width],
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2,
        num_class_embeds=11,
    )
    module = DiffusionModule(
        network,
        **settings,
        num_classes=10,
        label_dropout=0.1,
        sigma_data=0.75,
        optimizer=functools.partial(torch.optim.AdamW, lr=2e-3),
    )
    data = Digits(batch_size=64)
    trainer = Trainer(
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module.train(), data.train_dataloader()


def moments(module: DiffusionModule, loader: Iterable[Any], batches: int):
    """Return means by bin of ``‖g‖²`` and of what "gradient" and "loss" learn, ``(3, BINS)``."""
    loss = DiffusionLoss(module)
    measurement = GradientMeasurement(loss, generator, parameter_groups(module)[1])
    found = torch.zeros(3, BINS, dtype=torch.float64)
    for number, batch in zip(range(batches), loader, strict=False):
        clean = module.clean(batch)
        parts = measurement.per_sample_by_level(clean, BINS, number)
        for i, part in enumerate(parts):
            times = loss.times(clean, generator(number, i, "t"), i / BINS, (i + 1) / BINS)
            with torch.no_grad():
                estimate = module.compute_loss(*module.draw(clean, generator(number, i), times))
            per_draw = estimate.per_draw.double()
            weight = module.objective.weight(estimate.noised.t).double()
            values = (part.second_moment[0], (weight * per_draw).mean(), per_draw.square().mean())
            found[:, i] += torch.stack([value.double() for value in values])
    return found


def remaining(true: torch.Tensor, learned: torch.Tensor):
    """Return the second moment of the gradient under q ∝ sqrt(learned), over that under p."""
    q = learned.sqrt() / learned.sqrt().mean()
    return float((true / ((1 - FLOOR) * q + FLOOR)).mean() / true.mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--width", type=int, default=32, help="of the network")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.batches, options.width = 2, 1, 8
    rows = []
    for name, settings in WORKLOADS.items():
        found = moments(*trained(settings, options.steps, options.width), options.batches)
        rows.append((name, [remaining(found[0], learned) for learned in found]))
    print(f"{'':26}{'best q':>10}{'gradient':>10}{'loss':>10}")
    for name, values in rows:
        print(f"{name:26}" + "".join(f"{value:10.2f}" for value in values))


if __name__ == "__main__":
    main()
