"""The command line: fit, validate, test and predict, on Lightning's.

    python -m lightning_vr fit --config configs/digits_stf.yaml
    python -m lightning_vr predict --ckpt_path last --num_samples 100

It differs from ``LightningCLI`` in three ways. What is configured wins over a checkpoint's
hyperparameters, which build the module only where the configuration does not; a setting that cannot
take effect together with a checkpoint is an error. ``predict`` draws samples and needs no data. A
wrong setting is one line on stderr. The room may import every other one.
"""

from lightning_vr.cli.entry_point import main, run
from lightning_vr.cli.vr_cli import VRCLI

__all__ = ["VRCLI", "main", "run"]
