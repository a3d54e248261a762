"""Settings of the trainer that Lightning accepts, but ignores, changes or divides by."""

import math
from typing import Any

_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}


def check_trainer_settings(settings: Any) -> None:
    """Raise if a setting would end in a traceback, or in another run than was asked for.

    Args:
        settings: The settings of the section ``trainer``.

    Raises:
        ValueError: With the name of the setting.
    """
    for name, least in _LEAST.items():
        value = settings.get(name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(
                f"`trainer.{name}` must be at least {least} and finite, got {value}: use "
                f"{max(1, least)}."
            )
    if settings.get("val_check_interval") == 0:
        raise ValueError(
            "`trainer.val_check_interval` must be positive, got 0: use limit_val_batches=0 for no "
            "validation."
        )
    if settings.accelerator == "cpu" and str(settings.precision) in ("16", "16-mixed"):
        raise ValueError(
            f"`trainer.precision` must be one that a CPU has, got {settings.precision}: use "
            f"bf16-mixed."
        )
