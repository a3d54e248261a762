"""Trainers that print nothing, and write to a temporary folder."""

import tempfile

from lightning.pytorch import Trainer

FOLDER = tempfile.TemporaryDirectory(prefix="lightning_vr_tests_")


def quiet_trainer(*extra, callbacks=(), **options):
    """Return a trainer for one CPU, unless options say otherwise."""
    quiet = {
        "accelerator": "cpu",
        "default_root_dir": FOLDER.name,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=[*callbacks, *extra], **(quiet | options))
