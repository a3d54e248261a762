"""Diffusion of an autoencoder's latents, which are encoded on the fly or read from a cache.

On the fly a latent is a draw from its posterior ``N(m, s²)``, another one each time. For ``STF`` a
bank of the training set would hold another draw than the one that was noised, which is a bias: use
``posterior="mean"``, references from the ``"batch"``, or a cache, whose draws last for an epoch.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_vr.core.digests import digest
from lightning_vr.core.types import Clean
from lightning_vr.data.cached_latents import CachedLatents
from lightning_vr.lifecycle.hyperparameters import HYPERPARAMETERS
from lightning_vr.lifecycle.own_state import AUTOENCODER, STATE
from lightning_vr.process.diffusers_autoencoder import Autoencoder, AutoencoderFolder
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.sigma_data import SigmaData
from lightning_vr.training.upstream import Upstream

_NO_CONDITION = ("image", "label", "index")


class LatentDiffusionModule(DiffusionModule):
    """A ``DiffusionModule`` whose samples are latents of pictures.

    It encodes batches of pictures, and takes latents from batches of ``CachedLatents``; ``decode``
    turns samples into pictures. With text or other columns in the batches override
    ``encode_condition``, which then encodes them on the fly, for the cache and for samples.

    A checkpoint holds the autoencoder's digest in place of its weights. Whoever loads one gives the
    folder again, as nothing opens a folder that a checkpoint names.

    Args:
        network: The network, on latents.
        autoencoder: The autoencoder's folder.
        **settings: Of ``DiffusionModule``; ``sigma_data="auto"`` needs a cache.
    """

    def __init__(self, network: nn.Module, autoencoder: AutoencoderFolder, **settings: Any) -> None:
        super().__init__(network=network, **settings)
        self._parts = {name for name, _ in self.named_children()} | {"autoencoder"}
        self.autoencoder = Autoencoder(autoencoder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> Self:
        """Do what ``DiffusionModule`` does; the autoencoder is that in ``vae`` unless given."""
        settings.setdefault("autoencoder", AutoencoderFolder(str(folder), "vae"))
        return super().from_pretrained(folder, **settings)

    def encode(self, batch: Any) -> Clean:
        """Encode pictures; latents that are encoded already stay as they are."""
        if isinstance(batch, Clean) or (isinstance(batch, Mapping) and "x0" in batch):
            return Clean.from_batch(batch)
        clean, std = self.encode_moments(batch)
        if self.autoencoder.folder.posterior == "mean":
            return clean
        return replace(clean, x0=clean.x0 + std * torch.randn_like(std))

    def encode_moments(self, batch: Any) -> tuple[Clean, Tensor]:
        """Return the posteriors of a batch of pictures: their means as samples, and deviations."""
        pictures = Clean.from_batch(batch)
        cond = pictures.cond
        if self.encodes_condition and isinstance(batch, Mapping):
            columns = {name: x for name, x in batch.items() if name not in _NO_CONDITION}
            with torch.no_grad():
                cond = self.encode_condition(columns) if columns else None
        mean, std = self.autoencoder.moments(pictures.x0)
        return replace(pictures, x0=mean, cond=cond), std

    def decode(self, x0: Tensor) -> Tensor:
        """Turn latents into pictures in [-1, 1]."""
        return self.autoencoder.decode(x0)

    @property
    def encodes_condition(self) -> bool:
        """Whether further columns of a batch are encoded."""
        return type(self).encode_condition is not Upstream.encode_condition

    @property
    def condition_digest(self) -> str:
        """What tells the encoder of conditions from others: the parts that a subclass has added."""
        if not self.encodes_condition:
            return ""
        state = self.state_dict()
        added = {name: x for name, x in state.items() if name.split(".")[0] not in self._parts}
        return digest({name: x for name, x in added.items() if isinstance(x, Tensor)})

    def first_sigma_data(self, given: SigmaData) -> float:
        """Return a number to build the module with; a cache knows that of its latents."""
        return 0.5 if given == "auto" else super().first_sigma_data(given)

    def setup(self, stage: str) -> None:
        """Check that a cache is of this autoencoder, and that ``"auto"`` can be known."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if isinstance(data, CachedLatents):
            self._check_cache(data)
        elif math.isnan(self.sigma_data) and data is not None:
            raise ValueError(
                f"`sigma_data` must be a number where pictures are encoded on the fly, got 'auto': "
                f"the {type(data).__name__} knows the standard deviation of pixels. Give that of "
                f"some latents, or train from CachedLatents."
            )
        super().setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what identifies the autoencoder, which whoever loads the checkpoint gives again."""
        super().on_save_checkpoint(checkpoint)
        folder, state = self.autoencoder.folder.path, checkpoint[STATE]
        state[AUTOENCODER] = {"folder": folder, "digest": self.autoencoder.digest}
        if checkpoint[HYPERPARAMETERS].pop("autoencoder", None) is not None:
            state["objects"] = [*state["objects"], "autoencoder"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise if the checkpoint's latents are those of another autoencoder."""
        saved = checkpoint.get(STATE, {}).get(AUTOENCODER)
        if saved is not None and saved["digest"] != self.autoencoder.digest:
            raise ValueError(
                f"`autoencoder` must be the one that the checkpoint was trained with, that of "
                f"{saved['folder']}, got that of {self.autoencoder.folder.path}, which has other "
                f"weights, scales or dtype: give the folder that holds it."
            )
        super().on_load_checkpoint(checkpoint)

    def _check_cache(self, data: CachedLatents) -> None:
        found = data.index.identity
        if found.autoencoder != self.autoencoder.digest:
            raise ValueError(
                f"`path` must be a cache of the module's autoencoder, but that of {data.path} has "
                f"other weights, scales or dtype than that of {self.autoencoder.folder.path}: "
                f"encode the data again by `cache`, into another folder."
            )
        if found.condition and self.encodes_condition and found.condition != self.condition_digest:
            raise ValueError(
                f"`path` must be a cache of the module's conditions, but those of {data.path} were "
                f"encoded by another `encode_condition` or other weights: encode the data again by "
                f"`cache`, into another folder."
            )
