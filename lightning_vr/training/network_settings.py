"""Settings of a network: checkpointed activations, compilation, and names without the compiler's.

Attention needs no setting: diffusers calls torch's fused attention, whose memory is linear in the
number of tokens, and its sliced attention is slower and no smaller beside that.

``torch.compile(network)`` puts ``_orig_mod.`` into the name of each weight. A network that is
compiled here is compiled in place, which names nothing; one that comes compiled saves its weights
under their plain names, and loads them from plain names and from those of the compiler alike.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_vr.core.devices import without_compiler

_COMPILED = "_orig_mod."


def prepare_network(
    network: nn.Module, gradient_checkpointing: bool, compile_network: bool
) -> nn.Module:
    """Return the network, with settings that its own constructor does not take.

    Labels are dropped by ``label_dropout`` alone, by keyed draws: a DiT of diffusers would drop a
    tenth in each of its blocks.

    Args:
        network: The network; it is changed.
        gradient_checkpointing: Whether its activations are computed again in the backward pass.
        compile_network: Whether it is compiled, when it is first called, if it is not yet.

    Raises:
        ValueError: If it has no checkpoints.
    """
    plain: Any = without_compiler(network)  # types do not know what diffusers adds
    for part in plain.modules():
        if hasattr(part, "token_drop"):
            part.dropout_prob = 0.0
    if gradient_checkpointing:
        if not getattr(plain, "_supports_gradient_checkpointing", False):
            raise ValueError(
                f"`gradient_checkpointing` must be False for a network that has none, got True for "
                f"a {type(plain).__name__}: use a model of diffusers, or torch.utils.checkpoint in "
                f"your own `forward`."
            )
        plain.enable_gradient_checkpointing()
    if compile_network and plain is network:
        network.compile()
    return network


def use_plain_keys(module: nn.Module) -> None:
    """Let a module save and load weights of compiled networks in it under their plain names."""
    module.register_state_dict_post_hook(_save_plain)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_load_plain)  # type: ignore[no-untyped-call]


def _save_plain(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    if any(_COMPILED in name for name in state):
        _rename(state, prefix, _plain)


def _load_plain(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    parts = dict(module.named_modules(remove_duplicate=False))
    own = {_plain(f"{name}."): f"{name}." for name in parts if _COMPILED in f"{name}."}
    if own or any(_COMPILED in name for name in state):
        _rename(state, prefix, lambda name: _own_name(_plain(name), own))


def _own_name(name: str, own: dict[str, str]) -> str:
    """Return the name of a weight in a module that holds compiled parts."""
    path, dot, leaf = name.rpartition(".")
    return own.get(path + dot, path + dot) + leaf


def _rename(state: dict[str, Any], prefix: str, new_name: Callable[[str], str]) -> None:
    """Rename what begins with a prefix, and keep the order."""
    items = list(state.items())
    state.clear()
    for name, value in items:
        is_own = name.startswith(prefix)
        state[prefix + new_name(name.removeprefix(prefix)) if is_own else name] = value


def _plain(name: str) -> str:
    return name.replace(_COMPILED, "")
