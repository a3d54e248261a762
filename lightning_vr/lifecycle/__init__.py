"""The run of any LightningModule: resume, stop, durable files, checkpoints, averages, loggers.

What is known of Lightning's private attributes stands here alone. The room imports ``core`` and
``estimators``.
"""

from lightning_vr.lifecycle.checkpoint_io import DurableCheckpointIO

__all__ = [
    "DurableCheckpointIO",
]
