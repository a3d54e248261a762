"""Settings as they are printed and saved, with a comment that says how the network is called."""

import inspect
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_vr.lifecycle.configuration import imported
from lightning_vr.process.calling_conventions import NetworkCall
from lightning_vr.process.diffusers_network import (
    Pretrained,
    network_class,
    network_folder,
    saved_config,
)
from lightning_vr.process.network_dtype import InDtype
from lightning_vr.training.diffusion import Diffusion


class NetworkMappingParser(LightningArgumentParser):
    """A parser whose YAML ends with how the network is called."""

    def dump(self, namespace: Namespace, format: str = "parser_mode", **kwargs: Any) -> str:
        """Return settings as text, and below them the network's call as a comment.

        The settings are not checked again: that they were parsed takes half as long.
        """
        text: str = super().dump(namespace, format, **(kwargs | {"skip_validation": True}))
        mapping = None if "json" in format else _mapping(namespace.get("model"))
        return text if mapping is None else f"{text}# network: {mapping}\n"


def _mapping(model: Any) -> str | None:
    """Return how the network of a model's settings is called, None if they do not say."""
    settings = model.as_dict() if isinstance(model, Namespace) else model
    kind = _class_of(settings)
    if kind is None or not issubclass(kind, Diffusion):
        return None
    arguments = settings.get("init_args") or {}
    if kind.predict is not Diffusion.predict:
        return f"called by {kind.__name__}.predict"
    try:
        call = _call(arguments.get("network"))
    except ValueError as error:
        return " ".join(str(error).split())
    has_labels = arguments.get("num_classes") is not None
    return None if call is None else call.mapping(has_labels=has_labels)


def _call(settings: Any) -> NetworkCall | None:
    kind = _class_of(settings)
    if kind is None:
        return None
    arguments = settings.get("init_args") or {}
    if issubclass(kind, InDtype):
        return _call(arguments.get("network"))
    if issubclass(kind, Pretrained):
        folder = network_folder(arguments["path"], arguments.get("subfolder"))
        config = saved_config(folder)
        return NetworkCall.of_class(network_class(config, folder), config)
    parameters = inspect.signature(kind).parameters.values()
    defaults = {x.name: x.default for x in parameters if x.default is not x.empty}
    return NetworkCall.of_class(kind, defaults | arguments)


def _class_of(settings: Any) -> type[Any] | None:
    path = settings.get("class_path") if isinstance(settings, Mapping) else None
    kind = imported(path) if isinstance(path, str) else None
    return kind if isinstance(kind, type) else None
