"""A training step hands its work to the device and waits for no number of it.

But once: before the optimizer's step one look tells whether all gradients are finite. What makes
the host wait on a device is an operation that on a CPU can be seen too.
"""

import pytest
import torch
from lightning.pytorch import Trainer
from support.waits import Waits

from lightning_vr import (
    CARV,
    STF,
    Cosine,
    DiffusionModule,
    LearnedProposal,
    ResidualMLP,
    TaylorCV,
    WeightProposal,
)
from lightning_vr.core import devices

SLOTS = {
    "plain": dict,
    "stf-batch": lambda: {"target": STF("batch")},
    "stf": lambda: {"target": STF(64)},
    "stf-all": lambda: {"target": STF("all")},
    "strata": lambda: {"draws": CARV(1)},
    "pairs": lambda: {"draws": CARV(2, LearnedProposal(), antithetic=True)},
    "weights": lambda: {"draws": CARV(2, WeightProposal(), scope="global")},
    "chunks": lambda: {"draws": CARV(4, chunk_size=32)},
    "taylor": lambda: {"control_variate": TaylorCV(gate="open", coefficient=1.0)},
}


def points(count):
    index = torch.arange(count)
    source = torch.Generator().manual_seed(0)
    return {"x0": torch.randn(count, 2, generator=source), "label": index % 3, "index": index}


@pytest.mark.parametrize("slots", SLOTS)
def test_a_training_step_waits_for_no_number(slots, monkeypatch):
    monkeypatch.setattr(devices, "host_waits", lambda device: True)
    module = DiffusionModule(
        ResidualMLP(2, width=8, depth=1, num_class_embeds=4),
        schedule=Cosine(),
        prediction="epsilon",
        num_classes=3,
        label_dropout=0.1,
        **SLOTS[slots](),
    )
    everything = points(256)
    module.target.fill(everything["x0"], everything["label"], indexed=True)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    module.log = lambda *_, **__: None
    batch = points(32)
    module.training_step(batch, 0).backward()  # the first batch is checked
    with Waits() as waits:
        module.training_step(batch, 0).backward()
        module.draws.advance()
    assert waits.places == []
    with waits:
        module.on_before_optimizer_step(None)
    assert len(waits.places) == 1
