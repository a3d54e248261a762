"""A trained model as files that other programs read, none of them pickled.

``diffusers``: a folder of a pipeline. ``safetensors``: the network's weights under their own names,
and how they were trained. ``onnx``: the network as a graph. ``lora``: an adapter of low rank alone.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_vr.core.validation import check_choice
from lightning_vr.pipelines.model_card import loading_a_pipeline, model_card
from lightning_vr.pipelines.onnx_graph import check_onnx, save_onnx
from lightning_vr.pipelines.outgoing_pipeline import (
    component,
    network_to_export,
    to_pipeline,
    trained_network,
)
from lightning_vr.pipelines.provenance import Provenance
from lightning_vr.pipelines.trained_for import described, trained_for
from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.training.adapters import adapter_alone
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.incoming_folder import TRAINED_FOR

ExportFormat = Literal["diffusers", "safetensors", "onnx", "lora"]

_CODE = "denoising_pipeline"
_ADAPTER, _METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"


def export(
    model: Diffusion,
    folder: str | Path,
    format: ExportFormat = "diffusers",  # the option's name
    *,
    facts: Provenance | None = None,
) -> None:
    """Write a trained model, with averaged weights where it has some, and a README.md.

    Args:
        model: The model.
        folder: A folder that is new or empty.
        format: ``"diffusers"``: a pipeline that diffusers loads without this package.
            ``"safetensors"``: model.safetensors and config.json. ``"onnx"``: model.onnx and
            config.json. ``"lora"``: pytorch_lora_weights.safetensors, for ``load_lora_weights`` of
            diffusers; in the other formats an adapter is part of the network's weights.
        facts: What the README says of the run; what the model knows of it if not given.

    Raises:
        ValueError: If the folder has files, or if what it would hold would not sample as the model
            does.
    """
    check_choice("format", format, get_args(ExportFormat))
    folder, facts = Path(folder).expanduser(), facts or Provenance.of_model(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`output` must be a new or empty folder, got {folder}: name another.")
    if format == "diffusers":
        loading = _save_pipeline(model, folder)
    elif format == "lora":
        loading = _save_adapter(model, folder)
    else:
        loading = _save_network(model, folder, format)
    (folder / "README.md").write_text(model_card(model, facts, loading, format))


def _save_pipeline(model: Diffusion, folder: Path) -> str:
    pipeline = to_pipeline(model)
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = folder / "model_index.json"
    if type(pipeline).__name__ == "DenoisingPipeline":
        # diffusers finds the class in the folder by the name of its file
        _add(index, _class_name=[_CODE, "DenoisingPipeline"])
        shutil.copyfile(Path(__file__).with_name(f"{_CODE}.py"), folder / f"{_CODE}.py")
    if type(pipeline).__name__ == "DiTPipeline":  # which reads what it does not write
        _add(index, id2label={str(label): name for name, label in pipeline.labels.items()})
    settings = trained_for(model)
    if isinstance(model.schedule, DiffusersSchedule):  # which the scheduler's own file describes
        settings["schedule"] = {"class_path": "DiffusersSchedule"}
    _write(folder / TRAINED_FOR, settings)
    return loading_a_pipeline(pipeline, model)


def _save_adapter(model: Diffusion, folder: Path) -> str:
    from safetensors.torch import save_file

    network = trained_network(model)
    found = adapter_alone(network)
    if found is None:
        raise ValueError(
            "`format` must be another than 'lora' for a network without an adapter, got 'lora': "
            "train one with `adapter`, or use 'diffusers'."
        )
    name = component(network)
    weights, settings = ({f"{name}.{key}": x for key, x in each.items()} for each in found)
    folder.mkdir(parents=True, exist_ok=True)
    # where diffusers looks for the scale, which no weight says
    metadata = {"format": "pt", _METADATA: json.dumps(settings, sort_keys=True)}
    save_file(weights, str(folder / _ADAPTER), metadata)
    return (
        f"{_ADAPTER} is an adapter of a {type(network).__name__}: "
        f"`pipeline.load_lora_weights(folder)` in diffusers, or "
        f'`network.load_lora_adapter(folder, prefix="{name}", use_safetensors=True)`.'
    )


def _save_network(model: Diffusion, folder: Path, format: ExportFormat) -> str:
    from safetensors.torch import save_model

    network = network_to_export(model)
    if format == "onnx":
        check_onnx()
    name = "model.onnx" if format == "onnx" else "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if format == "onnx":
        save_onnx(model, network, folder / name)
    else:
        save_model(network, str(folder / name))
    _write(folder / "config.json", {"network": described(network), **trained_for(model)})
    return (
        f"{name} is the network, called with x_t (for the prediction edm scaled by 1 / sqrt(sigma² "
        f"+ alpha² sigma_data²)) and the time that the schedule in config.json embeds; what its "
        f"output is `prediction` says."
    )


def _add(path: Path, **settings: Any) -> None:
    _write(path, json.loads(path.read_text()) | settings)


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
