"""A frozen autoencoder of diffusers: pictures to latents, and latents to pictures.

``AutoencoderKL`` gives each picture a Gaussian posterior ``N(m, s²)`` of its latent z (Rombach et
al. 2022, arXiv 2112.10752). Models are trained on ``x0 = (z - shift) · scale``, by the settings in
the autoencoder's folder: ``scale`` is ``scaling_factor`` and ``shift`` is ``shift_factor``, or per
channel ``scaling_factor / latents_std`` and ``latents_mean``. ``decode`` undoes both.

Its weights are in no checkpoint and in no optimizer, and keep their dtype whatever the precision of
a run: it is held beside the parts of a module, and follows their device alone. Copies of a module,
as an average of its weights is one, share it. What identifies it is a digest of its weights and of
both scales.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_vr.core.digests import digest
from lightning_vr.core.shared_model import SharedModel
from lightning_vr.core.validation import check_choice, check_instance
from lightning_vr.process.diffusers_network import load_pretrained, network_folder, saved_config
from lightning_vr.process.network_dtype import DTYPES, NetworkDtype

Posterior = Literal["sample", "mean"]
"""What of a posterior a latent is: a draw, another one each time, or its mean."""

_AT_ONCE = 16
"""Latents that are decoded at a time, as a decoder needs a hundred times the memory of pictures."""


@dataclass(frozen=True)
class AutoencoderFolder:
    """The folder of an ``AutoencoderKL`` that diffusers wrote, and how it is used.

    Attributes:
        path: The folder: of the autoencoder, or of a pipeline.
        subfolder: The autoencoder's folder in that of a pipeline, mostly ``vae``.
        dtype: The dtype of its weights, in which it computes.
        variant: What stands in the names of the files of weights, as ``fp16``.
        posterior: Whether a latent is a draw from its posterior, or the posterior's mean.
        tiling: Whether large pictures are encoded and decoded in tiles: less memory, and seams may
            show.
    """

    path: str
    subfolder: str | None = None
    dtype: NetworkDtype = "float32"
    variant: str | None = None
    posterior: Posterior = "sample"
    tiling: bool = False

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("posterior", self.posterior, ("sample", "mean"))


class Autoencoder(nn.Module):
    """A frozen ``AutoencoderKL``.

    Args:
        folder: Where it is. Nothing is downloaded, and no pickle is read.

    Raises:
        ValueError: If there is none, or if its weights are not all there.
    """

    _device: Tensor

    def __init__(self, folder: AutoencoderFolder) -> None:
        super().__init__()
        example = "AutoencoderFolder(path, subfolder), or override `encode` for another autoencoder"
        check_instance("autoencoder", folder, AutoencoderFolder, example)
        self.folder = folder
        model = _load(folder)
        self.in_channels = int(model.config.in_channels)
        self._shift, self._scale = _scales(model.config)
        if folder.tiling:
            model.enable_tiling()
        # no part of this module, so that it is neither trained, averaged nor saved
        self._shared = SharedModel(model)
        self.register_buffer("_device", torch.zeros(()), persistent=False)

    @cached_property
    def digest(self) -> str:
        """What tells it from other autoencoders, and from itself in another dtype."""
        weights = self._shared.model.state_dict()
        return digest({**weights, "shift": self._shift, "scale": self._scale})

    @property
    def scales(self) -> tuple[list[float], list[float]]:
        """Shift and scale of latents, one number each or one for each channel."""
        return self._shift.flatten().tolist(), self._scale.flatten().tolist()

    def model(self, dtype: torch.dtype) -> Any:
        """Return a copy of the ``AutoencoderKL`` itself, which knows neither shift nor scale."""
        # past diffusers, which warns of each change of a dtype
        return nn.Module.to(copy.deepcopy(self._shared.model), dtype)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``posterior`` does, without a graph."""
        return self.posterior(images)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents' posterior, as x0, in float32.

        Both can be differentiated by the pictures.

        Args:
            images: Pictures in [-1, 1] ``(B, C, H, W)``.

        Raises:
            ValueError: If they are none, or have another number of channels.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"`autoencoder` takes pictures (B, {self.in_channels}, H, W), got "
                f"{tuple(images.shape)}: give the data module `channels={self.in_channels}`, or "
                f"use another autoencoder."
            )
        model = self._on_device()
        with torch.autocast(images.device.type, enabled=False):
            posterior = model.encode(images.to(model.dtype)).latent_dist
        shift, scale = self._shift.to(images.device), self._scale.to(images.device)
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Return pictures in [-1, 1], to which they are clamped ``(B, C, H, W)``, in float32."""
        latents = x0.float() / self._scale.to(x0.device) + self._shift.to(x0.device)
        model = self._on_device()
        with torch.autocast(x0.device.type, enabled=False):
            parts = latents.to(model.dtype).split(_AT_ONCE)  # type: ignore[no-untyped-call]
            pictures = torch.cat([model.decode(part).sample.float() for part in parts])
        return pictures.clamp(-1, 1)

    def _on_device(self) -> Any:
        return self._shared.on(self._device.device)


def _load(given: AutoencoderFolder) -> Any:
    folder = network_folder(given.path, given.subfolder)
    name = saved_config(folder).get("_class_name")
    if name != "AutoencoderKL":
        raise ValueError(
            f"`autoencoder` must be the folder of an AutoencoderKL of diffusers, but {folder} "
            f"holds a {name}: name another, or its `subfolder`, often 'vae'."
        )
    from diffusers import AutoencoderKL  # which takes seconds

    model = load_pretrained(AutoencoderKL, folder, given.dtype, given.variant)
    return model.requires_grad_(False).eval()


def _scales(config: Any) -> tuple[Tensor, Tensor]:
    """Return shift and scale, for all channels or for each, ``(1, C, 1, 1)``."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    shift, scale = config.get("shift_factor"), torch.tensor(float(config.scaling_factor))
    if mean is None:
        shift = torch.tensor(float(shift or 0.0))
    elif shift is None:
        shift = torch.tensor(mean, dtype=torch.float32)
    else:
        raise ValueError(
            "`autoencoder` must have a `shift_factor` or a `latents_mean` in its config.json, got "
            "both: remove the one that the latents were not trained with."
        )
    if std is not None:
        scale = scale / torch.tensor(std, dtype=torch.float32)
    return shift.reshape(1, -1, 1, 1), scale.reshape(1, -1, 1, 1)
