"""``sigma_data="auto"``: the standard deviation of the training data, as its data module knows it.

The number is taken at the module's ``setup``, which follows the data module's. From then on it is a
number: in ``hparams``, in checkpoints and in modules that are loaded from them. A run that resumes
keeps the number of its checkpoint, whatever the data are now, as its weights were trained with it.
"""

import math
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_vr.lifecycle.hyperparameters import Description
from lightning_vr.lifecycle.own_state import STATE
from lightning_vr.lifecycle.resumable_module import ResumableModule
from lightning_vr.process.objective import Objective
from lightning_vr.process.weightings import UnitWeighting
from lightning_vr.training.checks import check_objective
from lightning_vr.training.diffusion import Diffusion

SigmaData = float | Literal["auto"]


class AutoSigmaData(Diffusion, ResumableModule):
    """The part of a ``DiffusionModule`` that turns ``"auto"`` into a number."""

    _description: Description

    def first_sigma_data(self, given: SigmaData) -> float:
        """Return a number to build the module with, whose checks need one.

        Args:
            given: The argument ``sigma_data``.

        Raises:
            ValueError: If it is other text, or the module encodes data into other samples.
        """
        if not isinstance(given, str):
            return given
        _check_auto(given, encodes=type(self).encode is not Diffusion.encode)
        return 0.5

    def note_sigma_data(self, given: SigmaData, *, has_weighting: bool) -> None:
        """Keep what was given; until the number is known it is NaN.

        Args:
            given: The argument ``sigma_data``.
            has_weighting: Whether the loss weight was given too.
        """
        self._has_auto_sigma_data = given == "auto"
        self._has_default_weighting = not has_weighting
        if self._has_auto_sigma_data:
            self.sigma_data = math.nan

    @property
    def objective(self) -> Objective:
        """The loss as an expectation, whatever estimates it."""
        if math.isnan(self.sigma_data):
            raise _unknown(self._trainer)
        return super().objective

    def setup(self, stage: str) -> None:
        """Take ``sigma_data="auto"`` from the data module."""
        super().setup(stage)
        if math.isnan(self.sigma_data):
            known = _known(self.trainer)
            if known is not None:
                self._set_sigma_data(known)

    def on_fit_start(self) -> None:
        """Raise if neither the data module nor a checkpoint knows ``sigma_data="auto"``."""
        self.objective  # noqa: B018
        super().on_fit_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number."""
        super().on_save_checkpoint(checkpoint)
        is_known = not math.isnan(self.sigma_data)
        checkpoint[STATE]["sigma_data"] = self.sigma_data if is_known else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the number, unless the module was built with one."""
        super().on_load_checkpoint(checkpoint)
        if self._has_auto_sigma_data:
            saved = _saved(checkpoint.get(STATE, {}), self.sigma_data)
            if saved is not None:
                self._set_sigma_data(saved)

    def _set_sigma_data(self, sigma_data: float) -> None:
        self.sigma_data = sigma_data
        if self._has_default_weighting:
            self.weighting = UnitWeighting(self.prediction, sigma_data)
        check_objective(self.objective)
        self._description.replace(self, "sigma_data", sigma_data)


def _known(trainer: Trainer) -> float | None:
    """Return what the data module of a trainer knows, the same on all ranks; None if it does not.

    Args:
        trainer: A trainer whose data module is set up.

    Raises:
        ValueError: If the data do not vary, or the data module has no number.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    known = getattr(datamodule, "sigma_data", None)
    if known is None:
        return None
    try:
        number = float(known)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(
            f"`sigma_data` of {type(datamodule).__name__} must be positive and finite for a module "
            f"with sigma_data='auto', got {known!r}: give the module a number, or look at the data."
        )
    number = float(trainer.strategy.broadcast(number))
    rank_zero_info(
        f"sigma_data is {number:.6g}, the standard deviation of the training data of "
        f"{type(datamodule).__name__}."
    )
    return number


def _saved(state: dict[str, Any], now: float) -> float | None:
    """Return the number that a checkpoint was trained with, None if it has none.

    Args:
        state: What this package keeps in the checkpoint.
        now: The number that the data module knows, NaN if none does.
    """
    saved = state.get("sigma_data")
    if saved is None:
        return None
    if not math.isnan(now) and not math.isclose(saved, now, rel_tol=1e-6):
        rank_zero_info(
            f"sigma_data is {saved:.6g}, as in the checkpoint; that of the data is {now:.6g} now."
        )
    return float(saved)


def _unknown(trainer: Trainer | None) -> ValueError:
    """Return the error for a module that needs the number before anything knows it."""
    datamodule = getattr(trainer, "datamodule", None)
    if trainer is None:
        source = "a module that no trainer has set up"
    elif datamodule is None:
        source = "a trainer without a data module"
    else:
        source = f"a {type(datamodule).__name__}, which has no `sigma_data`"
    return ValueError(
        f"`sigma_data` must be a number where no data module knows it, got 'auto' and {source}: "
        f"give the standard deviation of the data, or `fit` with a data module that has "
        f"`sigma_data`; a `setup` that you override must call `super().setup(stage)`."
    )


def _check_auto(value: Any, *, encodes: bool) -> None:
    """Raise if text is not ``"auto"``, or the data module's number is not that of clean samples.

    Args:
        value: The argument ``sigma_data``.
        encodes: Whether the module turns data into other samples.
    """
    if value != "auto":
        raise ValueError(
            f"`sigma_data` must be a number or 'auto', got {value!r}: use one such as 0.5."
        )
    if encodes:
        raise ValueError(
            "`sigma_data` must be a number where `encode` is overridden, got 'auto': the data "
            "module knows the standard deviation of what it loads, not of what `encode` returns. "
            "Give that of some encoded samples."
        )
