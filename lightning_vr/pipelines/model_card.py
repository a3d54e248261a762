"""The README.md of an exported folder: what it is, how to load it, and the run that made it."""

import inspect
import platform
from importlib.metadata import version
from typing import Any

import yaml

from lightning_vr.pipelines.provenance import Provenance
from lightning_vr.process.sampling import USUAL_STEPS
from lightning_vr.training.diffusion import Diffusion

_PACKAGES = ("lightning-vr", "torch", "lightning", "diffusers")
_SLOTS = ("draws", "target", "control_variate")


def model_card(model: Diffusion, facts: Provenance, how_to_load: str, kind: str) -> str:
    """Return the text of a model card.

    Args:
        model: The model.
        facts: The run that trained it.
        how_to_load: Markdown that says how to load what lies beside the card.
        kind: What lies beside it: ``diffusers`` is the library's name for a Hub.
    """
    library = "library_name: diffusers\n" if kind == "diffusers" else ""
    sections = [
        f"---\n{library}tags:\n- diffusion\n- lightning_vr\n---",
        f"# {type(model.network).__name__}, {type(model.schedule).__name__}, {model.prediction}",
        how_to_load,
        f"## Training\n\n{_training(model, facts)}",
    ]
    if facts.numbers:
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in facts.numbers.items())
        sections.append(f"## Measured\n\n| number | value |\n|---|---|\n{rows}")
    settings = {"model": facts.settings, "data": facts.data}
    known = {name: value for name, value in settings.items() if value}
    if known:
        text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
        sections.append(f"## Settings\n\n```yaml\n{text}```")
    return "\n\n".join(sections) + "\n"


def loading_a_pipeline(pipeline: Any, model: Diffusion) -> str:
    """Return how to load the folder of a pipeline, in three lines."""
    name = type(pipeline).__name__
    is_own = name == "DenoisingPipeline"
    call = f"num_inference_steps={model.sampler.steps or USUAL_STEPS}"
    if is_own and model.num_classes is not None:
        labels = list(range(min(4, model.num_classes)))
        call = f"batch_size={len(labels)}, class_labels={labels}, {call}"
    network = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    found = getattr(pipeline, network)
    needed = "encoder_hidden_states"
    if needed in inspect.signature(found.forward).parameters:
        call = f'cond={{"{needed}": embeddings}}, {call}'
    options = ", trust_remote_code=True" if is_own else ""
    text = (
        f"```python\nfrom diffusers import DiffusionPipeline\n"
        f'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{options})\n'
        f"images = pipeline({call}).images\n```\n"
    )
    if is_own:
        text += (
            "\nThe pipeline's code is in denoising_pipeline.py, which needs torch and diffusers "
            "alone.\n"
        )
    kind = type(found).__name__
    text += f'\nThe network alone: `{kind}.from_pretrained(folder, subfolder="{network}")`.'
    return text + _parts_of_others(pipeline, found)


def _parts_of_others(pipeline: Any, network: Any) -> str:
    """Return which pipelines of diffusers take network and scheduler, beside what they need."""
    settings: Any = pipeline.config
    if settings.get("time_scale", 1.0) != 1 or settings.get("time_shift", 0.0) != 0:
        return (
            " Other pipelines call it with the scheduler's timestep t, where it was trained with "
            f"{settings['time_scale']:g} t + {settings['time_shift']:g}."
        )
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        return (
            " With your own text encoder, tokenizer and autoencoder network and scheduler are "
            "parts of a StableDiffusionPipeline."
        )
    has_channels = network.config.get("out_channels") is not None  # DiTPipeline reads them
    if kind == "DiTTransformer2DModel" and settings.get("num_classes") == 1000 and has_channels:
        return " With your own autoencoder network and scheduler are parts of a DiTPipeline."
    return ""


def _training(model: Diffusion, facts: Provenance) -> str:
    lines = {
        "Weights": f"{facts.weights}",
        "Optimizer steps": facts.steps,
        "Seed": facts.seed,
        "Data": _class_name(facts.data),
        **{name: type(getattr(model, name)).__name__ for name in _SLOTS if getattr(model, name)},
        "Sample": model.sample_shape,
        "Versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{x} {version(x)}" for x in _PACKAGES)]
        ),
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items() if value is not None)


def _class_name(data: Any) -> str | None:
    if isinstance(data, dict):
        return str(data.get("class_path")).rpartition(".")[2]
    return data if data is None else str(data)
