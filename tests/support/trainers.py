"""Trainers that write and print nothing."""

from lightning.pytorch import Trainer


def quiet_trainer(*extra, callbacks=(), **options):
    """Return a trainer for one CPU, unless options say otherwise."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=[*callbacks, *extra], **(quiet | options))
