"""Which pipelines of diffusers sample as a trained model does.

=======================  ===========================================================================
pipeline                 of
=======================  ===========================================================================
DDIMPipeline             pictures of a ``UNet2DModel`` without classes, with a ``DDIMScheduler``
DDPMPipeline             the same with a ``DDPMScheduler``, also of a learned variance, or a flow's
DiTPipeline              latents of a ``DiTTransformer2DModel`` with an ``AutoencoderKL``
StableDiffusionPipeline  latents of a ``UNet2DConditionModel`` that is conditioned on text alone, as
                         parts: text encoder and tokenizer are not known here
=======================  ===========================================================================

The last two decode ``latents / scaling_factor`` and know no shift. DiTPipeline takes label 1000 for
no class, begins with standard normal noise, and leaves out what is learned about the variance.
"""

from typing import Any

from torch import nn

from lightning_vr.core.devices import dtype_of
from lightning_vr.pipelines.outgoing_schedulers import OutgoingScheduler
from lightning_vr.process.diffusers_autoencoder import Autoencoder
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.latents import LatentDiffusionModule

_LEARNED = ("learned", "learned_range")
_NULL_LABEL = 1000
"""What stands for no class in DiTPipeline."""


def stock_pipeline(
    model: Diffusion, network: Any, found: OutgoingScheduler, shape: tuple[int, ...]
) -> Any | None:
    """Return a pipeline of diffusers that calls network and scheduler rightly, or None.

    Args:
        model: The model.
        network: A copy of its network.
        found: The scheduler that goes with it.
        shape: Shape of one sample.
    """
    import diffusers

    if not found.is_plain:
        return None
    kind = type(network).__name__
    if kind == "UNet2DModel" and model.num_classes is None and samples_pictures(model, shape):
        name = _pixel_pipeline(network, found.scheduler)
        return name and getattr(diffusers, name)(unet=network, scheduler=found.scheduler)
    autoencoder = autoencoder_of(model)
    if kind != "DiTTransformer2DModel" or autoencoder is None:
        return None
    if not _suits_dit(model, network, found.scheduler) or not _is_scaled_alone(autoencoder):
        return None
    labels = {label: str(label) for label in range(_NULL_LABEL)}
    vae = autoencoder.model(dtype_of(network))
    return diffusers.DiTPipeline(network, vae, found.scheduler, labels)


def is_part_of_stable_diffusion(model: Diffusion, network: Any, found: Any) -> bool:
    """Return whether network, scheduler and autoencoder are parts of a StableDiffusionPipeline.

    Args:
        model: The model.
        network: Its network.
        found: The scheduler.
    """
    settings = network.config if type(network).__name__ == "UNet2DConditionModel" else None
    if settings is None or settings.get("addition_embed_type") or settings.get("class_embed_type"):
        return False
    autoencoder = autoencoder_of(model)
    has_latents = autoencoder is not None and _is_scaled_alone(autoencoder)
    # it would guide the variance too; and EDM's scheduler begins with other noise there
    takes_output = not _doubles(network) and type(found).__name__ != "EDMEulerScheduler"
    # it sets both of these, whatever they were
    own = found.config.get("steps_offset", 1) == 1 and not found.config.get("clip_sample", False)
    return has_latents and takes_output and own and hasattr(found, "scale_model_input")


def samples_pictures(model: Diffusion, shape: tuple[int, ...]) -> bool:
    """Return whether samples are pictures as they are, of one colour or of three."""
    return type(model).decode is Diffusion.decode and len(shape) == 3 and shape[0] in (1, 3)


def autoencoder_of(model: Diffusion) -> Autoencoder | None:
    """Return the autoencoder that decodes a model's samples, or None if none or more does."""
    if not isinstance(model, LatentDiffusionModule):
        return None
    return model.autoencoder if type(model).decode is LatentDiffusionModule.decode else None


def _pixel_pipeline(network: Any, scheduler: Any) -> str | None:
    name, settings = type(scheduler).__name__, network.config
    takes_labels = settings.get("num_class_embeds") or settings.get("class_embed_type")
    is_dynamic = scheduler.config.get("use_dynamic_shifting", False)
    if takes_labels or is_dynamic or _doubles(network) != _is_learned(scheduler):
        return None
    if name == "DDIMScheduler":
        return "DDIMPipeline"
    return "DDPMPipeline" if name in ("DDPMScheduler", "FlowMatchEulerDiscreteScheduler") else None


def _suits_dit(model: Diffusion, network: Any, scheduler: Any) -> bool:
    knows_no_class = 0 < model.label_dropout < 1  # guidance is 4 where none is given
    is_known = model.num_classes == _NULL_LABEL and knows_no_class and model.sampler.guidance >= 1
    has_channels = network.config.get("out_channels") is not None  # it reads them
    begins_right = float(getattr(scheduler, "init_noise_sigma", 0)) == 1
    takes_output = hasattr(scheduler, "scale_model_input") and not _is_learned(scheduler)
    return is_known and has_channels and begins_right and takes_output


def _is_learned(scheduler: Any) -> bool:
    return scheduler.config.get("variance_type") in _LEARNED


def _doubles(network: nn.Module) -> bool:
    """Return whether a network says something about the variance too."""
    config: Any = network.config
    channels, out = config.get("in_channels"), config.get("out_channels")
    return channels is not None and out == 2 * int(channels)


def _is_scaled_alone(autoencoder: Autoencoder) -> bool:
    shift, scale = autoencoder.scales
    return len(scale) == 1 and not any(shift)
