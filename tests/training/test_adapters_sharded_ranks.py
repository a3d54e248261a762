"""Adapters beside a network that is sharded over two ranks, against DDP."""

from functools import partial

import pytest
import torch
from support.networks import small_unet
from support.ranks import launch
from support.trainers import quiet_trainer
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from lightning_vr import EMA, DiffusionModule, Pretrained, ShardedStrategy
from lightning_vr.training.adapters import LoRA

pytest.importorskip("peft", reason="needs the extra 'adapters'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
]

ATTENTION = {
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",),
    "attention_head_dim": 4,
}
SGD = partial(torch.optim.SGD, lr=0.1)
SHARDED = partial(ShardedStrategy, block_size=300)


class Images(Dataset):
    x0 = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2

    def __len__(self):
        return len(self.x0)

    def __getitem__(self, i):
        return {"x0": self.x0[i], "index": i}


def module(folder, dtype="float32"):
    torch.manual_seed(0)
    network = Pretrained(str(folder), dtype=dtype)
    return DiffusionModule(network, adapter=LoRA(2), optimizer=SGD)


def fit(model, strategy, *callbacks, steps=3, **options):
    settings = {"devices": 2, "max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    trainer = quiet_trainer(*callbacks, strategy=strategy, **settings)
    trainer.fit(model, DataLoader(Images(), batch_size=3), weights_only=True, **options)
    return trainer


def whole(model):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def adapters_as_under_ddp(_, folder, saved):
    for dtype, rounding in (("float32", 1e-5), ("bfloat16", 3e-2)):
        found = []
        for strategy in ("ddp", SHARDED()):
            model = module(folder, dtype)
            start = {name: p.clone() for name, p in whole(model).items()}
            fit(model, strategy, EMA(decay=0.5))
            found.append(whole(model))
            for name, p in found[-1].items():
                assert torch.equal(p, start[name]) == (".lora_" not in name), name
        assert all(isinstance(p, DTensor) for p in model.network.parameters())
        torch.testing.assert_close(*found, rtol=rounding, atol=rounding / 10)
    for as_folder in (False, True):
        path = saved / f"{as_folder}.ckpt"
        strategy = partial(SHARDED, save_distributed_checkpoint=as_folder)
        fit(module(folder), strategy(), EMA(decay=0.5), steps=2).save_checkpoint(path)
        again, unstopped = module(folder), module(folder)
        fit(unstopped, strategy(), EMA(decay=0.5))
        fit(again, strategy(), EMA(decay=0.5), ckpt_path=path)
        resumed, expected = whole(again), whole(unstopped)
        assert all(torch.equal(resumed[name], x) for name, x in expected.items())
    again.trainer.save_checkpoint(saved / "end.ckpt")
    if torch.distributed.get_rank() == 0:
        torch.save(expected, saved / "expected.pt")


def test_an_adapter_trains_beside_a_sharded_network_as_under_ddp_and_resumes(tmp_path):
    folder = tmp_path / "unet"
    small_unet(**ATTENTION).save_pretrained(folder)
    launch(partial(adapters_as_under_ddp, folder=folder, saved=tmp_path), 2)
    expected = torch.load(tmp_path / "expected.pt")
    loaded = DiffusionModule.load_from_checkpoint(
        tmp_path / "end.ckpt", network=Pretrained(str(folder))
    )
    assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())
    meta = torch.load(tmp_path / "end.ckpt/meta.pt", weights_only=True)
    kept = meta["checkpoint"]["state_dict"]
    assert all(".lora_" in name for name in kept if name.startswith("network."))
