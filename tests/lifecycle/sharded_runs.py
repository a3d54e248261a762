"""Short runs on two ranks, with weights whole or sharded, that leave their whole weights in a file.

All runs of one name start from the same weights, on the same data.
"""

import functools
import time

import torch
from lightning.pytorch import Callback
from support.trainers import quiet_trainer
from torch.distributed.tensor import DTensor

from lightning_vr import (
    CARV,
    DSM,
    EMA,
    IID,
    STF,
    Clean,
    DiffusionModule,
    LearnedProposal,
    ResidualMLP,
    Sampler,
    ShardedStrategy,
    TaylorCV,
)
from lightning_vr.data import EightGaussians

DRAWS = {
    "IID": IID,
    "strata": functools.partial(CARV, 1),
    "learned": lambda **chunks: CARV(2, LearnedProposal(bins=3), **chunks),
    "pairs": functools.partial(CARV, 2, antithetic=True),
}
TARGETS = {
    "DSM": DSM,
    "batch": lambda: STF("batch"),
    "n": lambda: STF(20),
    "all": lambda: STF("all"),
    "all-sharded": lambda: STF("all", sharded=True),
}
FACTORS = {
    "draws": list(DRAWS),
    "target": list(TARGETS),
    "control": [False, True],
    "chunks": [None, 12],
    "accumulate": [1, 2],
    "clip": [None, 0.5],
    "averages": [False, True],
}
COMPOSED = dict(zip(FACTORS, ("learned", "all", False, 12, 2, 0.5, True), strict=True))
CHUNKED = COMPOSED | {"draws": "pairs", "target": "DSM"}


def is_allowed(row):
    return row["draws"] != "IID" or row["chunks"] is None


def slots(row):
    """Return the slots of a module for a row of factors."""
    chunks = {} if row["chunks"] is None else {"chunk_size": row["chunks"]}
    control = TaylorCV(gate="open", coefficient=0.7) if row["control"] else None
    draws, target = DRAWS[row["draws"]](**chunks), TARGETS[row["target"]]()
    return {"draws": draws, "target": target, "control_variate": control}


def steps(row):
    """Return the settings of a trainer for a row of factors."""
    return {"accumulate_grad_batches": row["accumulate"], "gradient_clip_val": row["clip"]}


ADAM = functools.partial(torch.optim.AdamW, lr=0.02)
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5)


def build(row=None, kind=DiffusionModule, optimizer=ADAM, **options):
    """Return a module for a row of factors, or a plain one."""
    torch.manual_seed(0)
    network = options.pop("network", ResidualMLP(2, width=16, depth=2))
    chosen = (slots(row) if row else {}) | options
    return kind(network, sampler=Sampler(steps=2), optimizer=optimizer, **chosen)


def data():
    return EightGaussians(batch_size=16, num_samples=160, num_validation=16)


def strategy(name):
    if name in ("auto", "ddp"):
        return name
    return ShardedStrategy(block_size=300, save_distributed_checkpoint=name == "folder")


def averages():
    return EMA(decay=[0.5, 0.9], relative_lengths=[0.1])


def fit(how, module, *callbacks, ranks=2, **options):
    """Fit under a strategy; ``"file"`` and ``"folder"`` shard weights, and say what is saved."""
    where = {name: options.pop(name) for name in ("ckpt_path",) if name in options}
    settings = {"max_steps": 4, "max_epochs": -1, "limit_val_batches": 0, "devices": ranks}
    trainer = quiet_trainer(*callbacks, strategy=strategy(how), **(settings | options))
    trainer.fit(module, data(), weights_only=True if where else None, **where)
    return trainer


@torch.no_grad()
def weights(module):
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.network.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


class Shared(torch.nn.Module):
    """Two maps with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.last.weight = self.first.weight

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x)))


class SlowToEncode(DiffusionModule):
    """Several draws of each sample pay."""

    def encode(self, batch):
        time.sleep(0.03)
        return Clean.from_batch(batch)


class BreakGradient(Callback):
    """Puts a NaN into this rank's rows of a gradient."""

    def __init__(self, rank):
        self.rank = rank

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_rank == self.rank and trainer.global_step == 1:
            gradient = next(module.network.parameters()).grad
            own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            own.view(-1)[0] = torch.nan
