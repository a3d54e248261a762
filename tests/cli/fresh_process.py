"""A process that shows what it imports, draws and says, and ends as the command line does.

    python fresh_process.py CHECKPOINT ARGUMENTS

prints a line of JSON, and then runs the command line with the arguments. All that only a process of
its own can show is in one: most of its time goes into the imports of Lightning.
"""

import json
import os
import runpy
import sys
import tempfile
from contextlib import contextmanager

# torchmetrics, which Lightning imports, imports matplotlib where it is installed
import lightning.pytorch  # noqa: F401

HEAVY = {"diffusers", "wandb", "matplotlib", "sklearn", "datasets", "torch_fidelity"}
THEIRS = set(sys.modules)


def heavy():
    return sorted(HEAVY & set(sys.modules) - THEIRS)


@contextmanager
def written(said):
    """Add to a list what is written to stdout and stderr, by whatever means."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile("w+") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            sys.stdout.flush()
            for descriptor, own in zip((1, 2), kept, strict=True):
                os.dup2(own, descriptor)
        file.seek(0)
        said.append(file.read())


path, *sys.argv[1:] = sys.argv[1:]
shown = {"theirs": sorted(HEAVY & THEIRS)}

import lightning_vr  # noqa: E402

shown["package"] = heavy()
said = []
with written(said):
    module = lightning_vr.DiffusionModule.load_from_checkpoint(path)
    shown["samples"] = list(module.sample(3).shape)
shown["said"] = said[0]
shown["rooms"] = ["lightning_vr.pipelines" in sys.modules]  # what `to_pipeline` calls is known

import lightning_vr.data  # noqa: E402
from lightning_vr import *  # noqa: E402, F403

shown["rooms"] += [room in sys.modules for room in ("lightning_vr.data", "lightning_vr.training")]
shown["names"] = heavy()

import torch  # noqa: E402

from lightning_vr.core.rng import generator  # noqa: E402

shown["draw"] = torch.randn(1000, generator=generator(7, "train", 0, 3)).tolist()

from lightning_vr.cli import main  # noqa: E402

try:
    main(["--help"])
except SystemExit as end:
    shown["help"] = [end.code, heavy()]
print(f"\n{json.dumps(shown)}")
runpy.run_module("lightning_vr", run_name="__main__")
