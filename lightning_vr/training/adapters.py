"""LoRA: few weights, trained beside those of a pretrained network, which stay as they are.

Each targeted map W becomes ``W + (alpha / rank) B A`` with A of ``rank`` rows and B of as many
columns, which starts at 0 (Hu et al. 2021, arXiv 2106.09685). peft puts them into the network.

Checkpoints of a network from a folder hold the adapter alone, and a digest of the weights that it
was trained on: with others it would be another model. Whoever loads one gives the network, as
nothing opens a folder that a checkpoint names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_vr.core.devices import without_compiler
from lightning_vr.core.digests import digest
from lightning_vr.core.validation import check_integer
from lightning_vr.lifecycle.own_state import BASE, STATE
from lightning_vr.lifecycle.weight_averaging import drop_weights, update_weights

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of attention in diffusers' networks."""

_MARK, _ADAPTED, _NETWORK = ".lora_", ".base_layer.", "network."


@dataclass(frozen=True)
class LoRA:
    """An adapter of low rank.

    Attributes:
        rank: Rank of the change of each targeted map.
        targets: Names of the maps, or their ends; by default the projections of attention.
        alpha: Scale of the change times the rank; the rank if not given, a scale of 1.
    """

    rank: int = 8
    targets: Sequence[str] = ATTENTION
    alpha: int | None = None

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        if self.alpha is not None:
            check_integer("alpha", self.alpha, 1)
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(
                f"`targets` must be names of layers, got {self.targets!r}: give a list, for "
                f"example {list(ATTENTION)}."
            )


class Adapter:
    """A network's adapter, and what checkpoints hold in place of the network's own weights.

    Args:
        network: The pretrained network; it is changed, and only the adapter trains from now on.
        lora: The adapter's settings.

    Raises:
        ValueError: If the network has no such layers, or has an adapter already.
        ModuleNotFoundError: If peft is not installed.
    """

    def __init__(self, network: nn.Module, lora: LoRA) -> None:
        plain = without_compiler(network)
        _check(plain, lora)
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`adapter` needs peft, which is not installed: install 'lightning-vr[adapters]'."
            ) from error
        alpha = lora.rank if lora.alpha is None else lora.alpha
        settings = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets))
        network.requires_grad_(False)
        inject_adapter_in_model(settings, plain)
        for parameter in plain.parameters():
            if parameter.requires_grad:  # 16 bits would lose small steps
                parameter.data = parameter.data.float()
        self.folder = source_folder(plain)
        self._digest = None if self.folder is None else digest(_base(plain))

    def keep_alone(self, network: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Leave the weights of a network from a folder out of a checkpoint."""
        if self.folder is None:
            return
        names = [f"{_NETWORK}{name}" for name in _base(network)]
        drop_weights(checkpoint, names)
        checkpoint[STATE][BASE] = {"folder": self.folder, "digest": self._digest}
        # nothing opens a folder that a checkpoint names: the network is to be given again
        checkpoint["hyper_parameters"].pop("network", None)
        checkpoint[STATE]["objects"].append("network")

    def complete(self, network: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Put the weights that a checkpoint leaves out back into it: those of ``network``.

        Raises:
            ValueError: If they are not those that the adapter was trained on.
        """
        base = checkpoint.get(STATE, {}).get(BASE)
        if base is None:
            return
        if self._digest != base["digest"]:
            raise ValueError(
                f"`network` must have the weights that the adapter of the checkpoint was trained "
                f"on, those of {base['folder']}, got others: give a Pretrained network from a "
                f"folder that holds them."
            )
        update_weights(checkpoint, {f"{_NETWORK}{name}": x for name, x in _base(network).items()})


def merged(network: nn.Module) -> nn.Module:
    """Put a network's adapter, if it has one, into its weights, and return the network."""
    for name, part in list(network.named_modules()):
        if hasattr(part, "lora_A"):
            part.merge()
            network.set_submodule(name, part.get_base_layer())
    return network


def adapter_alone(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the weights of a network's adapter by peft's names, and its settings, or None."""
    adapters: Any = getattr(network, "peft_config", None)
    if adapters is None:
        return None
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(network)
    return {name: x.detach().contiguous() for name, x in weights.items()}, {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in adapters["default"].to_dict().items()
    }


def source_folder(network: nn.Module) -> str | None:
    """Return the folder that a network of diffusers comes from, or None."""
    path = dict(getattr(network, "config", {}) or {}).get("_name_or_path")
    return str(Path(path).resolve()) if path and Path(path).is_dir() else None


def load_base(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a network's weights, by the names that they have without its adapter.

    Raises:
        RuntimeError: If some are missing, or are others.
    """
    own = {name.replace(_ADAPTED, "."): name for name in _base(network)}
    adapter = {name: x for name, x in network.state_dict().items() if _MARK in name}
    network.load_state_dict(adapter | {own.get(name, name): x for name, x in weights.items()})


def _check(network: nn.Module, lora: LoRA) -> None:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    names = [name for name, part in network.named_modules() if isinstance(part, kinds)]
    if any(_MARK in f".{name}" for name, _ in network.named_parameters()):
        raise ValueError(
            "`network` must have no adapter yet, got one that has: merge it into the weights first "
            "(`unload`), or leave `adapter` out."
        )
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.split(".", name.count(".") - 1)[-1] for name in names})
            raise ValueError(
                f"`targets` must name layers of the {type(network).__name__}, got {target!r}: use "
                f"ends of names such as {', '.join(known[:8])}."
            )


def _base(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are not the adapter's, by their names in its state."""
    return {name: x for name, x in network.state_dict().items() if _MARK not in name}
