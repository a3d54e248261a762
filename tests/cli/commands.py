"""Command lines that are short to run: an MLP on points in the plane."""

from pathlib import Path

import yaml

from lightning_vr.cli import main

# the parser looks for a short name among all classes that are imported
POINTS = [
    "--data",
    "lightning_vr.data.EightGaussians",
    "--data.num_samples",
    "512",
    "--data.num_validation",
    "64",
]
NETWORK = [
    "--model.network",
    "lightning_vr.ResidualMLP",
    "--model.network.width",
    "16",
    "--model.network.depth",
    "1",
]
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
SAVE_LAST = {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}}


def run_in(folder, command, *flags, network=NETWORK, data=POINTS, short=SHORT):
    before = set(folder.glob("runs/version_*"))
    callbacks = ["--config", str(write(folder / "last.yaml", trainer={"callbacks": SAVE_LAST}))]
    main([command, *callbacks, *network, *data, *short, *flags])
    (new,) = set(folder.glob("runs/version_*")) - before
    return new


def write(path: Path, **settings) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path
