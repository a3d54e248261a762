"""Twelve small workloads with the plain estimator, on which recommendations of audits are tried."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_vr import (
    EDM,
    VE,
    VP,
    Clean,
    Cosine,
    DiffusionModule,
    RectifiedFlow,
    ResidualMLP,
)
from lightning_vr.data import Checkerboard, Digits, EightGaussians, Moons
from lightning_vr.training.adapters import LoRA

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


@dataclass(frozen=True)
class Workload:
    """A training job.

    Attributes:
        build: Makes its module, with slots as keywords, and its data.
        steps: Steps of a plain run.
    """

    build: Callable[..., tuple[DiffusionModule, LightningDataModule]]
    steps: int


class CostlyEncode(DiffusionModule):
    """Points that come out of a frozen network, which takes several times as long as training."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            wide = [layer for _ in range(4) for layer in (nn.Linear(1024, 1024), nn.Tanh())]
            self.encoder = nn.Sequential(nn.Linear(2, 1024), *wide).requires_grad_(False)

    def encode(self, batch: Any) -> Clean:
        clean = super().encode(batch)
        hidden = self.encoder(clean.x0)
        return Clean(clean.x0 + 0.1 * hidden[:, :2], index=clean.index)


def points(
    data: type, schedule: type = EDM, batch: int = 64, kind: type = DiffusionModule, **slots: Any
) -> tuple[DiffusionModule, LightningDataModule]:
    prediction = slots.pop("prediction", "auto")
    settings = {"schedule": schedule(), "sigma_data": 1.0, "optimizer": adamw(1e-3)}
    if prediction != "auto":
        settings["prediction"] = prediction
    module = kind(network=ResidualMLP(2, width=128), **settings, **slots)
    return module, data(batch_size=batch, num_samples=8192, num_validation=4096)


def digits(
    schedule: type = EDM, *, prediction: str | None = None, is_labelled: bool = False, **slots: Any
) -> tuple[DiffusionModule, LightningDataModule]:
    settings = {"schedule": schedule(), "sigma_data": 0.75, "optimizer": adamw(2e-3)}
    if prediction is not None:
        settings["prediction"] = prediction
    if is_labelled:
        settings |= {"num_classes": 10, "label_dropout": 0.1}
    module = DiffusionModule(network=unet(is_labelled), **settings, **slots)
    return module, Digits(batch_size=128)


def adapted_digits(**slots: Any) -> tuple[DiffusionModule, LightningDataModule]:
    """Return digits of a schedule of variance exploding, adapted from a network of another one."""
    network = unet(is_labelled=False)
    network.load_state_dict(pretrained())
    settings = {"schedule": VE(), "sigma_data": 0.75, "optimizer": adamw(2e-3)}
    adapter = LoRA(4, ["conv1", "conv2"])
    return DiffusionModule(network=network, adapter=adapter, **settings, **slots), Digits(128)


@functools.cache
def pretrained() -> dict[str, Tensor]:
    seed_everything(99, verbose=False)
    module, data = digits()
    Trainer(max_steps=200, **QUIET).fit(module, datamodule=data)
    return copy.deepcopy(module.network.state_dict())


def adamw(learning_rate: float) -> Any:
    return functools.partial(torch.optim.AdamW, lr=learning_rate)


def unet(is_labelled: bool) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=[32, 64],
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2,
        num_class_embeds=11 if is_labelled else None,
    )


WORKLOADS = {
    "gaussians_16": Workload(functools.partial(points, EightGaussians, batch=16), 3000),
    "gaussians_256": Workload(functools.partial(points, EightGaussians, batch=256), 1500),
    "moons_ve": Workload(functools.partial(points, Moons, VE), 2000),
    "moons_vp_epsilon": Workload(functools.partial(points, Moons, VP, prediction="epsilon"), 2000),
    "checkerboard_flow": Workload(functools.partial(points, Checkerboard, RectifiedFlow), 2000),
    "gaussians_encoded": Workload(
        functools.partial(points, EightGaussians, kind=CostlyEncode), 1500
    ),
    "digits_edm": Workload(functools.partial(digits, EDM), 750),
    "digits_ve": Workload(functools.partial(digits, VE), 750),
    "digits_vp_epsilon": Workload(functools.partial(digits, VP, prediction="epsilon"), 750),
    "digits_cosine_v": Workload(functools.partial(digits, Cosine, prediction="v"), 750),
    "digits_flow_classes": Workload(
        functools.partial(digits, RectifiedFlow, is_labelled=True), 750
    ),
    "digits_lora": Workload(adapted_digits, 500),
}
"""The cheapest first."""
