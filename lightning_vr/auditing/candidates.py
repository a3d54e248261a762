"""Candidates: estimators that could take the place of those in a module's slots."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_vr.core.devices import device_of
from lightning_vr.core.validation import check_instance
from lightning_vr.estimators.draws import Draws
from lightning_vr.estimators.loss import ControlVariate
from lightning_vr.estimators.targets import Target
from lightning_vr.lifecycle.configuration import UndescribableError, describe
from lightning_vr.process.timesteps import Density
from lightning_vr.process.weightings import Weighting
from lightning_vr.teachers.orbit_views import OrbitViews
from lightning_vr.training.estimator_module import EstimatorModule

CURRENT = "current"
"""Name of the module's own estimator."""

_OF_OBJECTIVE = {"timesteps", "weighting", "schedule", "prediction", "sigma_data"}
"""Settings of a module that decide what is learned, and not how it is estimated."""


@dataclass(frozen=True)
class Candidate:
    """An estimator to measure; slots that are not given are the module's own.

    Attributes:
        name: Its name in tables.
        draws: Times and noise.
        target: What to regress on.
        control_variate: A term of the loss whose gradient has mean zero; ``"none"`` leaves out
            that of the module.
        views: Views of a batch, of a module that draws them.
    """

    name: str
    draws: Draws | None = None
    target: Target | None = None
    control_variate: ControlVariate | Literal["none"] | None = None
    views: OrbitViews | None = None

    def __post_init__(self) -> None:
        for name, slot in self.slots().items():
            if isinstance(slot, (Density, Weighting)):
                raise ValueError(_changes_objective(self.name, name))

    def slots(self) -> dict[str, Any]:
        """Return the slots that it fills by name; None stands for no control variate."""
        _, *names = (field.name for field in fields(self))
        filled = {name: getattr(self, name) for name in names}
        return {name: None if x == "none" else x for name, x in filled.items() if x is not None}

    def config(self) -> dict[str, Any]:
        """Return the settings of a module that trains with it.

        Raises:
            UndescribableError: If a slot holds what no configuration can rebuild.
        """
        return {name: x and describe(x) for name, x in self.slots().items()}

    @contextmanager
    def in_place(self, module: EstimatorModule) -> Iterator[None]:
        """Put the candidate into the module's slots for the duration of the context."""
        own = {name: getattr(module, name) for name in self.slots()}
        try:
            for name, slot in self.slots().items():
                is_module = isinstance(slot, nn.Module)
                setattr(module, name, slot.to(device_of(module)) if is_module else slot)
            yield
        finally:
            for name, slot in own.items():
                setattr(module, name, slot)


def read_candidates(path: str | Path) -> list[Candidate]:
    """Read candidates from a YAML file: a list of names, each with the slots that it fills.

    The most promising come first: where the budget is too small for all, the last ones are dropped.

    Raises:
        ValueError: If there is no such file, or it holds something else.
        ArgumentError: If a setting is wrong.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"`candidates` must be a YAML file, got {path}, but there is no file of that name: "
            f"check the path."
        )
    try:
        listed = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`candidates` must be a YAML file, got {path}, which cannot be read ({error}): fix it "
            f"there."
        ) from error
    if not isinstance(listed, list) or not listed:
        raise ValueError(
            f"`candidates` must be a file with a list, got {path} with {type(listed).__name__}: "
            f"write `- name: ...` and a slot, such as `target:`."
        )
    for each in listed:
        for name in _OF_OBJECTIVE & each.keys() if isinstance(each, dict) else ():
            raise ValueError(_changes_objective(each.get("name"), name))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--candidates", type=list[Candidate])
    found = parser.instantiate(parser.parse_object({"candidates": listed})).candidates
    assert isinstance(found, list)
    return found


def check_exchangeable(module: Any) -> None:
    """Raise if a module has no estimators to exchange.

    Raises:
        MisconfigurationException: With its class.
    """
    if not isinstance(module, EstimatorModule):
        raise MisconfigurationException(
            f"`module` must be a DiffusionModule, ScoreDistillation or DistributionMatching, whose "
            f"estimators can be exchanged, got a {type(module).__name__}: measure it with the "
            f"callback GradientVariance."
        )


def check_candidates(candidates: list[Candidate], module: Any = None) -> None:
    """Raise if a candidate fills no slot or one that the module lacks, or two have the same name.

    Args:
        candidates: The candidates.
        module: Their module, if it is known.
    """
    for candidate in candidates:
        check_instance("candidates", candidate, Candidate, "Candidate('STF', target=STF('batch'))")
    names = [candidate.name for candidate in candidates]
    if len({*names, CURRENT}) <= len(names):
        raise ValueError(
            f"`candidates` must have different names, none of them 'current', got {names}: rename "
            f"some."
        )
    for candidate in candidates:
        if not candidate.slots():
            raise ValueError(
                f"Candidate {candidate.name!r} fills no slot: give it `draws`, `target`, "
                f"`control_variate` or `views`."
            )
        for name in candidate.slots():
            if module is not None and name not in module.estimator_slots:
                raise ValueError(
                    f"Candidate {candidate.name!r} fills `{name}`, which a "
                    f"{type(module).__name__} does not have: fill "
                    f"{' or '.join(f'`{x}`' for x in module.estimator_slots)}."
                )


def _changes_objective(candidate: Any, name: str) -> str:
    return (
        f"Candidate {candidate!r} must estimate the module's own objective, got `{name}`, which "
        f"changes it, so that variances cannot be compared: compare trained modules by their "
        f"held-out plain loss, as examples/objectives does."
    )


def settings(slot: Any) -> Any:
    """Return the configuration that rebuilds what is in a slot, or None if none can."""
    try:
        return describe(slot)
    except UndescribableError:
        return None
