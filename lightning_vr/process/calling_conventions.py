"""How networks are called: one adapter for each convention, chosen by the signature.

======  ==============================================================================  ===========
called  ``forward`` takes                                                               as do
======  ==============================================================================  ===========
plain   samples and timesteps first, whatever their names                               U-Nets, MLPs
DiT     ``hidden_states, timestep, class_labels``                                       DiT
PixArt  ``hidden_states, encoder_hidden_states, timestep, added_cond_kwargs``           PixArt
SD3     ``hidden_states, encoder_hidden_states, pooled_projections, timestep``          SD3
Flux    those of SD3, ``img_ids, txt_ids, guidance, joint_attention_kwargs``            Flux
======  ==============================================================================  ===========

Timesteps are in diffusers' range of a thousand and in float32 or better, as 16 bits are too few for
the phases of their embedding; Flux takes a thousandth of them, and pictures as packed tokens.
Labels go in as ``class_labels``, and a sample's further condition as keywords, its floating-point
tensors in the dtype of the network. Other transformers of diffusers are not guessed at: of two with
the same arguments one may count time the other way round, and would train without an error.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lightning_vr.core.devices import without_compiler
from lightning_vr.process.packed_latents import pack, picture_ids, text_ids

Convention = Literal["plain", "DiT", "PixArt", "SD3", "Flux"]

_TEXT, _POOLED, _ADDED = "encoder_hidden_states", "pooled_projections", "added_cond_kwargs"
_SIGNATURES: dict[Convention, set[str]] = {
    # one that has the arguments of another comes before it
    "Flux": {_TEXT, _POOLED, "img_ids", "txt_ids", "guidance", "joint_attention_kwargs"},
    "SD3": {_TEXT, _POOLED},
    "PixArt": {_TEXT, _ADDED},
    "DiT": {"class_labels"},
}
_LACKS: dict[Convention, str] = {"SD3": "img_ids", "DiT": _TEXT}
"""What other transformers take that have the arguments of a convention."""

_NEEDS: dict[Convention, tuple[str, ...]] = {
    "plain": (),
    "DiT": ("class_labels",),
    "PixArt": (_TEXT,),
    "SD3": (_TEXT, _POOLED),
    "Flux": (_TEXT, _POOLED),
}
"""What has a default in the signature, without which the network fails."""

_HIDDEN = ("hidden_states", "timestep")
_IDS = {"img_ids", "txt_ids"}
"""What the adapter of Flux makes itself."""


@dataclass(frozen=True)
class NetworkCall:
    """How one network is called.

    Attributes:
        name: The name of its class.
        convention: The calling convention.
        sample: Its argument for samples.
        time: Its argument for timesteps.
        needs: Further arguments that it cannot be called without.
        takes: Further arguments that it takes; None if it takes any.
    """

    name: str
    convention: Convention
    sample: str
    time: str
    needs: tuple[str, ...]
    takes: frozenset[str] | None

    @classmethod
    def of(cls, network: nn.Module) -> "NetworkCall":
        """Return how a network is called.

        Raises:
            ValueError: If its signature fits no convention.
        """
        network = without_compiler(network)
        known = _KNOWN.get(network)
        if known is not None:
            return known
        forward: Any = network.forward
        is_method = inspect.ismethod(forward)
        function = forward.__func__ if is_method else forward
        needed = _needed_by(configuration(network))
        found = _network_call(function, int(is_method), type(network).__name__, needed)
        _KNOWN[network] = found
        return found

    @classmethod
    def of_class(cls, kind: type[nn.Module], config: Mapping[str, Any]) -> "NetworkCall":
        """Return how a network of a class is called that would be built with these settings.

        Raises:
            ValueError: If its signature fits no convention.
        """
        return _network_call(kind.forward, 1, kind.__name__, _needed_by(config))

    def check(self, given: Collection[str]) -> None:
        """Raise if an argument is missing, or is none.

        Args:
            given: Names of the arguments beside samples and timesteps.

        Raises:
            ValueError: With the name of the first, and what to override.
        """
        if set(self.needs) <= set(given) and (self.takes is None or self.takes.issuperset(given)):
            return
        missing = next((name for name in self.needs if name not in given), None)
        if missing is not None:
            own = "set `num_classes`, or " if missing == "class_labels" else ""
            raise ValueError(
                f"`cond` must hold `{missing}`, which {self.name} cannot be called without, got "
                f"{', '.join(sorted(given)) or 'no condition'}: {own}override `encode` to return "
                f"it in `cond`, or override `predict`."
            )
        other = next((name for name in given if not self.accepts(name)), None)
        if other is not None:
            known = ", ".join(sorted(self.takes or ())) or "no further argument"
            raise ValueError(
                f"`cond` must hold arguments of {self.name}, which takes {known}, got `{other}`: "
                f"rename it in `encode`, or override `predict`."
            )

    def accepts(self, name: str) -> bool:
        """Return whether the network takes a further argument."""
        return self.takes is None or name in self.takes

    def arguments(
        self, x: Tensor, t: Tensor, given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the call by place and by name.

        Args:
            x: Scaled samples ``(B, *)``.
            t: Timesteps ``(B,)`` in the range of a thousand.
            given: Further arguments.

        Raises:
            ValueError: If samples cannot be packed into tokens and have to be.
        """
        if self.convention == "plain":
            return (x, t), given
        if self.convention != "Flux":
            return (), {self.sample: x, self.time: t, **given}
        ids = {
            "img_ids": picture_ids(*x.shape[-2:], device=x.device),
            "txt_ids": text_ids(given[_TEXT].shape[1], device=x.device),
        }
        return (), {self.sample: pack(x), self.time: t / 1000, **ids, **given}

    def mapping(self, *, has_labels: bool) -> str:
        """Return the call in words of Python: what goes into which argument."""
        is_flux = self.convention == "Flux"
        parts = {self.sample: "tokens of x" if is_flux else "x"}
        parts |= {self.time: "t / 1000" if is_flux else "t"}
        parts |= {name: f'cond["{name}"]' for name in self.needs}
        parts |= {"img_ids": "places of the tokens", "txt_ids": "zeros"} if is_flux else {}
        parts |= {"class_labels": "labels"} if has_labels else {}
        arguments = ", ".join(f"{name}={value}" for name, value in parts.items())
        return f"{self.name} is called as ({arguments})"


class _Signature(NamedTuple):
    """The arguments of a ``forward``.

    Attributes:
        places: Those that can be given by place.
        names: Those that can be given by name.
        required: Those without a default.
        takes_any: Whether it takes any others by name.
    """

    places: tuple[str, ...]
    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_any: bool


_KNOWN: WeakKeyDictionary[nn.Module, NetworkCall] = WeakKeyDictionary()
"""How networks are called; each call of one asks."""


def _network_call(
    function: Callable[..., Any], own: int, name: str, needed: tuple[str, ...]
) -> NetworkCall:
    """Return how a network is called.

    Args:
        function: Its ``forward``.
        own: Number of arguments of this that a caller does not give.
        name: The name of its class.
        needed: What it needs by its settings.
    """
    signature = _read(function, own)
    convention = _convention(name, signature)
    sample, time = signature.places[:2] if convention == "plain" else _HIDDEN
    made = {sample, time} | (_IDS if convention == "Flux" else set())
    needs = dict.fromkeys((*signature.required, *_NEEDS[convention], *needed))
    takes = None if signature.takes_any else frozenset(signature.names) - made
    own_needs = tuple(x for x in needs if x not in made)
    return NetworkCall(name, convention, sample, time, own_needs, takes)


def _read(function: Callable[..., Any], own: int) -> _Signature:
    """Return the arguments of a function without the first ``own``."""
    found = list(inspect.signature(function).parameters.values())[own:]
    places = [x.name for x in found if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    if any(x.kind == x.VAR_POSITIONAL for x in found):
        places += ["x", "t"][len(places) :]
    names = [x.name for x in found if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)]
    required = [x.name for x in found if x.default is x.empty and x.name in names]
    takes_any = any(x.kind == x.VAR_KEYWORD for x in found)
    return _Signature(tuple(places), tuple(names), tuple(required), takes_any)


def configuration(network: nn.Module) -> Mapping[str, Any]:
    """Return the settings of a model of diffusers; none of another network."""
    config = getattr(network, "config", None)
    return config if isinstance(config, Mapping) else {}


def _convention(name: str, signature: _Signature) -> Convention:
    names = set(signature.names)
    if _HIDDEN[0] not in names and len(signature.places) > 1:
        return "plain"
    if names.issuperset(_HIDDEN):
        for convention, own in _SIGNATURES.items():
            if own <= names and _LACKS.get(convention) not in names:
                return convention
    raise ValueError(
        f"`network` must take the call {name}(x, t), or that of a DiT, PixArt, SD3 or Flux "
        f"transformer, got one that takes ({', '.join(signature.names)}): use another network, or "
        f"override `predict`."
    )


def _needed_by(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a model of diffusers needs by its settings, and not by its signature."""
    needed = []
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        needed.append("class_labels")
    if config.get("guidance_embeds"):
        needed.append("guidance")
    has_more = config.get("use_additional_conditions")
    if has_more is None and "use_additional_conditions" in config:
        has_more = config.get("sample_size") == 128  # PixArt's at 1024 pixels
    if has_more or config.get("addition_embed_type") not in (None, "text"):
        needed.append(_ADDED)
    return tuple(needed)
