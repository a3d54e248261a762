"""The run of any LightningModule: resume, stop, durable files, checkpoints, averages, loggers.

What is known of Lightning's private attributes stands here alone. The room imports ``core`` and
``estimators``.
"""

from lightning_vr.lifecycle.checkpoint_io import DurableCheckpointIO
from lightning_vr.lifecycle.ema import EMA
from lightning_vr.lifecycle.power_averages import saved_average
from lightning_vr.lifecycle.resumable_module import ResumableModule
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.lifecycle.sharded_strategy import ShardedStrategy

__all__ = [
    "EMA",
    "DurableCheckpointIO",
    "ResumableModule",
    "RunContext",
    "ShardedStrategy",
    "saved_average",
]
