"""A training step on the digits with all of them as references, against plain score matching."""

import torch
from diffusers import UNet2DModel

from lightning_vr.data.digits import digits
from lightning_vr.estimators.dsm import DSM
from lightning_vr.estimators.stf import STF
from lightning_vr.module import DiffusionModule
from lightning_vr.rng import generator

BATCH_SIZE = 128


def training_step(target):
    """A function that trains for one step."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )
    module = DiffusionModule(network, num_classes=10, label_dropout=0.1, target=target)
    images, labels = digits()
    module.target.fill(images, labels, indexed=True)
    optimizer = module.configure_optimizers()
    index = torch.arange(BATCH_SIZE)
    batch = {"image": images[index], "label": labels[index], "index": index}

    def step():
        loss = module.loss(batch, generator("benchmark")).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def test_a_training_step_with_all_references_against_one_of_dsm(compare):
    ours, other = compare(
        training_step(STF("all")),
        training_step(DSM()),
        rounds=60,
        label="a training step with references='all' and one of DSM",
    )
    print(f"{ours / other:.3f} times as long")
