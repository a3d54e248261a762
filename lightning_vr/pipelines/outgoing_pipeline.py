"""A trained model as a pipeline of diffusers, in memory.

The pipeline is one of diffusers' own where that samples as the model does, see
``stock_pipelines.py``. Everything else is a ``DenoisingPipeline``: diffusers' own give such a
network no labels, or leave out a scheduler's scaling of its input, without an error.
"""

import copy
import inspect
from contextlib import nullcontext
from typing import Any

from torch import nn

from lightning_vr.core.devices import dtype_of, without_compiler
from lightning_vr.core.sharding import is_sharded
from lightning_vr.lifecycle.weight_averaging import weights_that_count
from lightning_vr.pipelines.outgoing_schedulers import outgoing_scheduler
from lightning_vr.pipelines.stock_pipelines import (
    autoencoder_of,
    samples_pictures,
    stock_pipeline,
)
from lightning_vr.training.adapters import merged
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.module import DiffusionModule

_FORMAT = "use the format safetensors"


def to_pipeline(model: Diffusion) -> Any:
    """Return a ``DiffusionPipeline`` that samples as ``model.sample`` does.

    It has a copy of the network, in evaluation mode, with averaged weights if the model is in a fit
    with ``EMA``. Save it by ``export``, which adds what a ``DenoisingPipeline`` needs.

    Args:
        model: A model whose network is one of diffusers.

    Raises:
        ValueError: If no pipeline would sample as the model does, with the reason.
    """
    network = network_to_export(model)
    _check_network(model, network)
    learns = model.variance is not None
    found = outgoing_scheduler(model.objective, model.sampler, learns_variance=learns)
    shape = _shape(model, network)
    autoencoder = autoencoder_of(model)
    stock = stock_pipeline(model, network, found, shape)
    if stock is not None:
        return stock

    from lightning_vr.pipelines.denoising_pipeline import DenoisingPipeline

    parts: dict[str, Any] = {component(network): network}
    if autoencoder is None:
        parts |= {"is_latent": not samples_pictures(model, shape)}
    else:
        shift, scale = autoencoder.scales
        parts |= {"vae": autoencoder.model(dtype_of(network))}
        parts |= {"latent_shift": shift, "latent_scale": scale}
    return DenoisingPipeline(
        found.scheduler,
        **parts,
        shape=list(shape),
        num_classes=model.num_classes,
        label_dropout=model.label_dropout,
        null_is_zeros=isinstance(model.null_cond, str),
        time_scale=found.time_scale,
        time_shift=found.time_shift,
        noise_levels=found.noise_levels,
        num_inference_steps=model.sampler.step_count,
        guidance_scale=model.sampler.guidance,
    )


def network_to_export(model: Diffusion) -> nn.Module:
    """Return a copy of a model's network with the weights that count, in evaluation mode.

    An adapter of low rank is part of its weights.
    """
    return merged(trained_network(model))


def trained_network(model: Diffusion) -> nn.Module:
    """Return a copy of a model's network as it trains, with the weights that count."""
    if is_sharded(model.network):
        raise ValueError(
            "`module` must have its weights whole to be copied, got sharded ones: save a "
            "checkpoint, and export what DiffusionModule.load_from_checkpoint makes of it."
        )
    with weights_that_count(model) if isinstance(model, DiffusionModule) else nullcontext():
        return copy.deepcopy(without_compiler(model.network)).eval()


def component(network: nn.Module) -> str:
    """Return the name of a network in pipelines."""
    return "unet" if "UNet" in type(network).__name__ else "transformer"


def _check_network(model: Diffusion, network: Any) -> None:
    import diffusers

    name = type(network).__name__
    own = type(model)
    is_own = own.predict_with_variance is not Diffusion.predict_with_variance
    if is_own or own.predict is not Diffusion.predict:
        raise ValueError(
            f"`predict` must not be overridden to export a pipeline, which calls the network as "
            f"diffusers does, got {type(model).__name__}: {_FORMAT}."
        )
    is_of_diffusers = isinstance(network, diffusers.ModelMixin)
    if not is_of_diffusers:
        raise ValueError(
            f"`network` must be a model of diffusers to be exported as a pipeline, got {name}: "
            f"{_FORMAT}."
        )
    takes = inspect.signature(network.forward).parameters
    if "timestep" not in takes or "img_ids" in takes:
        raise ValueError(
            f"`network` must take a `timestep` and samples as they are to be exported as a "
            f"pipeline, got {name}: {_FORMAT}."
        )
    config = network.config
    channels, out = config.get("in_channels"), config.get("out_channels")
    if out not in (None, channels) and out != 2 * channels:
        raise ValueError(
            f"`network` must return as many channels as it takes, or twice as many, to be exported "
            f"as a pipeline, got {channels} and {out}: {_FORMAT}."
        )


def _shape(model: Diffusion, network: Any) -> tuple[int, ...]:
    """Return the shape of samples, and let the network's settings agree with it.

    A U-Net takes pictures of many sizes, and pipelines sample the size in its settings.
    """
    shape, size = model.sample_shape, network.config.get("sample_size")
    if shape is None and size is None:
        raise ValueError(
            "`sample_size` of the network must be given to export a model that has seen no data, "
            "got None: set it, or export a trained model."
        )
    if shape is None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return (network.config["in_channels"], *sides)
    if component(network) == "unet" and len(shape) == 3:
        own = shape[1] if shape[1] == shape[2] else list(shape[1:])
        network.register_to_config(sample_size=own)
    return shape
