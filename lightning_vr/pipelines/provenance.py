"""Where weights come from: what a model card says of the run that trained them."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_vr.lifecycle.own_state import STATE
from lightning_vr.lifecycle.weight_averaging import is_averaged
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.module import DiffusionModule

_POINT_OF_CURVE = re.compile(r"/s\d[\d.e+-]*$")


@dataclass(frozen=True)
class Provenance:
    """Facts of a run.

    Attributes:
        weights: Whether the weights are averages of those that were trained.
        steps: Optimizer steps, or None if not known.
        seed: The run's seed, or None.
        data: The data module's settings, or its class alone; None if not known.
        settings: The model's settings.
        numbers: Numbers that the run measured last, by name.
    """

    weights: Literal["averaged", "trained"] = "trained"
    steps: int | None = None
    seed: int | None = None
    data: Any = None
    settings: Any = None
    numbers: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any], path: Any) -> "Provenance":
        """Read the facts from a checkpoint, and from the config.yaml of its run's folder."""
        own = checkpoint.get(STATE, {})
        config = _run_config(Path(path))
        settings = (config.get("model") or {}).get("init_args")
        return cls(
            "averaged" if own.get("is_averaged") else "trained",
            checkpoint.get("global_step"),
            own.get("seed"),
            config.get("data"),
            _public(settings or checkpoint.get("hyper_parameters", {})),
            _numbers(own.get("metrics", {})),
        )

    @classmethod
    def of_model(cls, model: Diffusion) -> "Provenance":
        """Read the facts from a model, and from the trainer that it has or had."""
        if not isinstance(model, DiffusionModule):
            return cls()
        trainer, settings = model._trainer, _public(dict(model.hparams))
        if trainer is None:
            return cls(seed=model.seed, settings=settings)
        datamodule = getattr(trainer, "datamodule", None)
        return cls(
            "averaged" if is_averaged(trainer) else "trained",
            trainer.global_step,
            model.seed,
            None if datamodule is None else type(datamodule).__name__,
            settings,
            _numbers(trainer.callback_metrics),
        )


def _run_config(checkpoint: Path) -> dict[str, Any]:
    """Return the settings in the folder of a checkpoint's run, or none."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        try:
            found = yaml.safe_load((folder / "config.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Return what was measured of the model as a whole, without points of curves and parts."""
    found = {}
    for name, value in metrics.items():
        is_part = name.count("/") > 1 or _POINT_OF_CURVE.search(name)
        if not is_part and not name.startswith("train/") and math.isfinite(float(value)):
            found[name] = float(value)
    return dict(sorted(found.items()))
