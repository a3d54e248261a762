"""Names of runs, which are folders, and must not lead out of the folder of all runs."""

from typing import Any

from jsonargparse import Namespace

from lightning_vr.lifecycle.loggers import leads_outside

_NAMES = ("project", "experiment_name", "name", "id", "run_name", "version", "sub_dir")
"""Arguments of loggers that become folders, in the order of those."""


def check_run_names(trainer: Namespace) -> None:
    """Raise if a logger's name or version leads out of its ``save_dir``.

    Args:
        trainer: The settings of the section ``trainer``.

    Raises:
        ValueError: With the setting.
    """
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
        if arguments:
            _check_names(arguments)


def _check_names(arguments: Any) -> None:
    parts: list[str] = []
    for name in _NAMES:
        value = arguments.get(name)
        if not isinstance(value, str):
            continue
        parts.append(value)
        if leads_outside(*parts) or leads_outside(value):
            raise ValueError(
                f"`trainer.logger.{name}` must stay within `trainer.logger.save_dir`, got {value}: "
                f"use a name without '..', or set `save_dir`."
            )
