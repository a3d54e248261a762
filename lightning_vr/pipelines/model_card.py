"""The README.md of an exported folder: what it is, how to load it, and the run that made it."""

import inspect
import platform
from importlib.metadata import version
from typing import Any

import yaml

from lightning_vr.pipelines.provenance import Provenance
from lightning_vr.pipelines.stock_pipelines import is_part_of_stable_diffusion
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
    """Return how to load the folder of a pipeline, in three lines, and what it does not do."""
    is_own = type(pipeline).__name__ == "DenoisingPipeline"
    name = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    network = getattr(pipeline, name)
    options = ", trust_remote_code=True" if is_own else ""
    text = (
        f"```python\nfrom diffusers import DiffusionPipeline\n"
        f'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{options})\n'
        f"images = pipeline({_call(pipeline, network, model)}).images\n```\n"
    )
    if is_own:
        text += (
            "\nThe pipeline's code is in denoising_pipeline.py, which needs torch and diffusers "
            "alone.\n"
        )
    kind = type(network).__name__
    text += f'\nThe network alone: `{kind}.from_pretrained(folder, subfolder="{name}")`.'
    return text + _parts_of_others(pipeline, network, model) + _left_out(pipeline, model)


def _call(pipeline: Any, network: Any, model: Diffusion) -> str:
    """Return the arguments of a call that samples as the model does."""
    is_own = type(pipeline).__name__ == "DenoisingPipeline"
    call = f"num_inference_steps={model.sampler.step_count}"
    if model.num_classes is not None:
        labels = list(range(min(4, model.num_classes)))
        size = f"batch_size={len(labels)}, " if is_own else ""
        guidance = "" if is_own else f"guidance_scale={model.sampler.guidance:g}, "
        call = f"{size}class_labels={labels}, {guidance}{call}"
    needed = "encoder_hidden_states"
    if needed in inspect.signature(network.forward).parameters:
        null = f'null_cond={{"{needed}": embeddings_of_no_text}}, '
        is_needed = model.sampler.guidance != 1 and not isinstance(model.null_cond, str)
        call = f'cond={{"{needed}": embeddings}}, {null if is_needed else ""}{call}'
    return call


def _parts_of_others(pipeline: Any, network: Any, model: Diffusion) -> str:
    """Return which pipelines of diffusers take network and scheduler, beside what they need."""
    settings: Any = pipeline.config
    if settings.get("time_scale", 1.0) != 1 or settings.get("time_shift", 0.0) != 0:
        return (
            " Other pipelines call it with the scheduler's timestep t, where it was trained with "
            f"{settings['time_scale']:g} t + {settings['time_shift']:g}."
        )
    if is_part_of_stable_diffusion(model, network, pipeline.scheduler):
        return (
            " With your own text encoder and tokenizer, `unet`, `scheduler` and `vae` are the "
            "other parts of a StableDiffusionPipeline."
        )
    return ""


def _left_out(pipeline: Any, model: Diffusion) -> str:
    """Return which settings of the model's sampler a pipeline does not follow, as a sentence."""
    sampler, names = model.sampler, []
    if type(pipeline.scheduler).__name__ != "EDMEulerScheduler" and sampler.grid != "polynomial":
        names.append("grid")
    names += [] if sampler.guidance_interval is None else ["guidance_interval"]
    names += [] if sampler.guidance_rescale == 0 else ["guidance_rescale"]
    if not names:
        return ""
    listed = " and ".join(f"`{name}`" for name in names)
    return f" The pipeline does not follow {listed} of the model's sampler."


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
