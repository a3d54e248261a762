"""Which classes and functions may be built from a checkpoint, which is data from a stranger.

Weights are read as plain tensors, but a checkpoint names classes for the constructor's arguments,
and to build a class is to run it. So:

* A class must be of this package, torch, diffusers, Lightning or torchmetrics, of a module that the
  process has imported already, or of a package that the user trusts. Nothing else is imported.
* It must be of the kind that its argument takes: an ``Optimizer``, an ``nn.Module``, a schedule.
  Being imported is not enough, since ``os`` is imported in each process.
* A function is taken only where one is wanted, and if it says that it returns that kind.
* No folder is opened: of a ``Pretrained`` network checkpoints hold the settings, not the folder.
"""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from lightning_vr.lifecycle.lookup import find_imported, find_importing
from lightning_vr.lifecycle.wanted_types import Wanted, result_type
from lightning_vr.process.diffusers_network import Pretrained
from lightning_vr.process.sampling import Sampler

LIBRARIES = ("lightning_vr", "torch.nn", "torch.optim", "diffusers", "lightning", "torchmetrics")
"""Packages whose classes may be imported and built, if they are of the kind wanted."""

_ROOTS = {name.partition(".")[0] for name in LIBRARIES}
_KINDS = (nn.Module, Optimizer, LRScheduler, Sampler)


@dataclass(frozen=True)
class Trust:
    """Which classes may be built from a checkpoint.

    Attributes:
        path: The checkpoint, for messages.
        packages: Further packages, modules or classes that may be imported and built.
    """

    path: Any
    packages: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.packages, str):
            raise ValueError(
                f"`trust` must be a list of packages, got {self.packages!r}: write "
                f"[{self.packages!r}]."
            )

    def find(self, name: str) -> Any:
        """Return what a dotted name stands for, None if there is none that may be looked at."""
        parts = name.split(".")
        if len(parts) < 2 or not all(part.isidentifier() for part in parts):
            return None
        return find_importing(name) if self.covers(name) else find_imported(name)

    def fits(self, found: Any, wanted: Wanted) -> bool:
        """Return whether something is a class or function of the kind that an argument takes."""
        if not isinstance(found, type):
            # no method, and nothing compiled
            is_plain = inspect.isfunction(found) and "." not in found.__qualname__
            result = result_type(found) if is_plain else None
            return result is not None and _is_subclass(result, wanted.made)
        if issubclass(found, Pretrained):
            return False
        bases = wanted.objects + wanted.made
        if issubclass(found, Metric):  # some of them download what they compare with
            return any(_is_subclass(base, (Metric,)) for base in bases)
        if wanted.takes_calls and issubclass(found, nn.Module):
            return True
        if wanted.is_open and (self._is_given(_home(found)) or _is_subclass(found, _kinds())):
            return True
        return _is_subclass(found, bases)

    def allows(self, found: Any) -> bool:
        """Return whether a class or function may be used, wherever its name has led."""
        if self.covers(_home(found)):
            return True
        module = str(found.__module__)
        root = module.partition(".")[0]
        return module in sys.modules and root not in _ROOTS | sys.stdlib_module_names

    def covers(self, name: str) -> bool:
        """Return whether a name is in one of the packages that may be imported."""
        return _is_in(name, LIBRARIES) or self._is_given(name)

    def refusal(self, argument: str, name: str) -> ValueError:
        """Return the error for what may not be imported, or is not there."""
        package = name.partition(".")[0]
        if self.covers(name):
            return ValueError(
                f"`{argument}` in the checkpoint {self.path} must be something that can be "
                f"imported, got {name}: install the version that the checkpoint was written with, "
                f"or give the argument yourself."
            )
        return ValueError(
            f"`{argument}` in the checkpoint {self.path} must be of this package, torch.nn, "
            f"torch.optim, diffusers, Lightning, or of a module that is imported, got {name}: if "
            f'you trust it, use load_from_checkpoint(path, trust=["{package}"]), or --trust '
            f"{package} on the command line."
        )

    def _is_given(self, name: str) -> bool:
        return _is_in(name, self.packages)


def _home(found: Any) -> str:
    return f"{found.__module__}.{found.__qualname__}"


def _is_in(name: str, packages: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def _is_subclass(kind: type, bases: tuple[type, ...]) -> bool:
    return any(issubclass(kind, base) for base in bases)


def _kinds() -> tuple[type, ...]:
    """Return what may be built where the type hint does not say what is wanted."""
    configured = getattr(sys.modules.get("diffusers.configuration_utils"), "ConfigMixin", None)
    return _KINDS if configured is None else (*_KINDS, configured)
