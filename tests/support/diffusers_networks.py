"""A tiny network of each calling convention, and a condition of each row."""

import diffusers
import torch

from support.networks import small_mlp, small_unet

SHAPE = (2, 8, 8)
"""Channels, height and width of a sample; points for the MLP."""

_TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 2,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
}


def _mlp():
    return small_mlp(std=0.5)


def _unet():
    return small_unet(in_channels=2, out_channels=2, num_class_embeds=4)


def _unet_conditional(**options):
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=6,
        attention_head_dim=4,
        **options,
    )


def _unet_sdxl():
    return _unet_conditional(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=5 + 6 * 4,
    )


def _dit(out_channels=4):
    return diffusers.DiTTransformer2DModel(
        **_TRANSFORMER, out_channels=out_channels, norm_num_groups=4, num_embeds_ada_norm=3
    )


def _pixart():
    return diffusers.PixArtTransformer2DModel(
        **_TRANSFORMER,
        out_channels=4,
        norm_num_groups=4,
        cross_attention_dim=8,
        caption_channels=6,
        use_additional_conditions=False,
    )


def _sd3():
    return diffusers.SD3Transformer2DModel(
        **_TRANSFORMER,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        out_channels=2,
        pos_embed_max_size=8,
    )


def _flux(guidance_embeds=True):
    return diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )


KINDS = {
    "MLP": _mlp,
    "UNet": _unet,
    "conditional UNet": _unet_conditional,
    "UNet of SDXL": _unet_sdxl,
    "DiT": _dit,
    "PixArt": _pixart,
    "SD3": _sd3,
    "Flux": _flux,
}
WITH_LABELS = ("UNet", "DiT")
WITH_VARIANCE = ("DiT", "PixArt")


def tiny(kind):
    """Return a network of a kind, with the same weights each time; none of them is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = KINDS[kind]()
        for parameter in network.parameters():  # DiT's last layers begin as zeros
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network


def shape_of(kind):
    return (2,) if kind == "MLP" else SHAPE


def condition(kind, count):
    """Return what a network of a kind needs beside labels, a row for each sample."""
    draw = torch.Generator().manual_seed(7)
    text = {"encoder_hidden_states": torch.randn(count, 3, 6, generator=draw)}
    pooled = {"pooled_projections": torch.randn(count, 5, generator=draw)}
    size = {
        "text_embeds": torch.randn(count, 5, generator=draw),
        "time_ids": torch.tensor([[8, 8, 0, 0, 8, 8]]).repeat(count, 1),
    }
    return {
        "MLP": None,
        "UNet": None,
        "DiT": None,
        "conditional UNet": text,
        "UNet of SDXL": text | {"added_cond_kwargs": size},
        "PixArt": text,
        "SD3": text | pooled,
        "Flux": text | pooled | {"guidance": torch.full((count,), 3.5)},
    }[kind]
