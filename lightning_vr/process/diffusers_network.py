"""A network of diffusers from a folder that ``save_pretrained`` wrote.

Nothing is downloaded, and no code or pickle is read: the class is one of diffusers, by the name in
``config.json``, and the weights are safetensors. The network that it makes is the plain model of
diffusers, so that checkpoints hold its weights under their own names and its settings in place of
the folder, which they do not need again.
"""

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lightning_vr.core.validation import check_choice
from lightning_vr.process.network_dtype import DTYPES, NetworkDtype

_CONFIG, _PIPELINE = "config.json", "model_index.json"


class Pretrained(nn.Module):
    """A network from a folder of diffusers: of one model, or of a pipeline with its subfolder.

    Its instance is the model of diffusers itself.

    Args:
        path: The folder.
        subfolder: The network's folder in that of a pipeline: ``unet`` or ``transformer``.
        dtype: The dtype of its weights.
        variant: What stands in the names of the files of weights, as ``fp16``.

    Raises:
        ValueError: If there is no network, or if its weights are not all there.
    """

    def __new__(  # type: ignore[misc]
        cls,
        path: str,
        subfolder: str | None = None,
        dtype: NetworkDtype = "float32",
        variant: str | None = None,
    ) -> nn.Module:
        check_choice("dtype", dtype, tuple(DTYPES))
        folder = network_folder(path, subfolder)
        kind = network_class(saved_config(folder), folder)
        return load_pretrained(kind, folder, dtype, variant)


def network_folder(path: str, subfolder: str | None) -> Path:
    """Return the folder of a network.

    Raises:
        ValueError: If there is none, or if it has no ``config.json``.
    """
    top = Path(path).expanduser()
    if not top.is_dir():
        raise ValueError(
            f"`path` must be a folder that diffusers wrote, but there is no folder {top}: correct "
            f"it. Nothing is downloaded."
        )
    folder = top / (subfolder or "")
    if (folder / _CONFIG).is_file():
        return folder
    parts = sorted(x.parent.name for x in top.glob(f"*/{_CONFIG}"))
    if parts:
        raise ValueError(
            f"`subfolder` must be that of the network in {top}, which has {', '.join(parts)}, got "
            f"{subfolder!r}: name the one of the network, often 'unet' or 'transformer'."
        )
    raise ValueError(
        f"`path` must be a folder that diffusers wrote, but {folder} has no {_CONFIG}: name the "
        f"folder that `save_pretrained` was given."
    )


def saved_config(folder: Path) -> dict[str, Any]:
    """Return the settings in the folder of a network.

    Raises:
        ValueError: If they cannot be read.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        config = str(error)
    if isinstance(config, dict):
        return config
    raise ValueError(
        f"`path` must be a folder that diffusers wrote, but {folder / _CONFIG} holds no settings "
        f"({config!s:.100}): save the network again."
    )


def network_class(config: dict[str, Any], folder: Path) -> type[nn.Module]:
    """Return the class of diffusers that settings name.

    Raises:
        ValueError: If it is none of diffusers, or no network that takes timesteps.
    """
    import diffusers  # which takes seconds

    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    base: Any = diffusers.ModelMixin
    if isinstance(kind, type) and issubclass(kind, base) and _takes_time(kind):
        return kind
    raise ValueError(
        f"`path` must be the folder of a network of diffusers that takes timesteps, but {folder} "
        f"holds a {name}: name another, or its `subfolder`."
    )


def _takes_time(kind: type[nn.Module]) -> bool:
    return any(name.startswith("timestep") for name in inspect.signature(kind.forward).parameters)


def load_pretrained(kind: Any, folder: Path, dtype: str, variant: str | None) -> nn.Module:
    """Return a model of diffusers with the weights in its folder.

    Raises:
        ValueError: If they are not all there, or others are.
    """
    try:
        with _quiet():
            network, found = kind.from_pretrained(
                folder,
                torch_dtype=DTYPES[dtype],
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # whatever diffusers and safetensors make of what is there
        raise ValueError(
            f"`path` must be a folder with the weights of a network as safetensors, but {folder} "
            f"does not load ({' '.join(str(error).split())[:200]}): save it by `save_pretrained`."
        ) from error
    wrong = [f"lacks {name}" for name in found["missing_keys"]]
    wrong += [f"has {name} too" for name in found["unexpected_keys"]]
    if wrong:
        raise ValueError(
            f"`path` must be a folder with the weights of its {kind.__name__}, but {folder} "
            f"{wrong[0]}: save it by `save_pretrained`."
        )
    if not network._keep_in_fp32_modules:
        nn.Module.to(network, DTYPES[dtype])  # diffusers leaves buffers as they are
    # diffusers gives it back for inference, without dropout
    loaded: nn.Module = network.train()
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what diffusers says beside the error that it raises."""
    log = logging.getLogger("diffusers.models.modeling_utils")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
