"""Networks that are small enough for tests; what a function makes always has the same weights."""

import diffusers
import torch
from torch import nn

from lightning_vr.process.networks import ResidualMLP


def small_mlp(width=8, std=None, num_class_embeds=None):
    """Return an MLP of points in the plane whose output is not 0 if ``std`` is given."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP(2, width=width, depth=1, num_class_embeds=num_class_embeds)
        if std is not None:
            nn.init.normal_(network.project_out.weight, std=std)
    return network


def small_unet(**options):
    """Return a U-Net of one level for images of 8 x 8 pixels."""
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(**(settings | options))


def digits_unet():
    """Return the network of configs/digits_stf.yaml."""
    return small_unet(
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )


class Normalised(nn.Module):
    """A network of points in the plane with a layer of normalisation of a kind."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 2), kind(2)

    def forward(self, x, t):
        return self.norm(self.linear(x))
