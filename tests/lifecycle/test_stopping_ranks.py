"""What ranks exchange in a step to stop or save together: two numbers, on the CPU."""

from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from support.networks import small_mlp
from support.trainers import quiet_trainer

from lightning_vr import STF, DiffusionModule
from lightning_vr.core.distributed import all_gather_numbers, any_of_ranks, numbers_group
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle.stopping import CoordinatedStop

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

COLLECTIVES = ["all_gather", "all_reduce", "broadcast", "barrier", "all_to_all_single"]
COLLECTIVES += ["all_gather_into_tensor", "reduce", "gather", "scatter"]


class CountCollectives(Callback):
    """Writes which collectives each rank has begun in one batch, but for those of gradients."""

    def __init__(self, folder):
        self.folder, self.found = folder, Counter()

    def on_train_start(self, trainer, module):
        for name in COLLECTIVES:
            setattr(dist, name, self.counted(name, getattr(dist, name)))

    def counted(self, name, whole):
        def call(*args, **kwargs):
            self.found[name] += 1
            return whole(*args, **kwargs)

        return call

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 3:
            torch.save(dict(self.found), self.folder / f"{trainer.global_rank}.pt")
        self.found.clear()  # from the start of a batch to that of the next


TARGETS = {
    "plain": (dict, {}),
    # counts, labels and samples
    "batch": (lambda: {"target": STF("batch")}, {"all_gather": 3}),
    "bank": (lambda: {"target": STF(8)}, {}),
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_exchanges_signals_once_and_what_the_target_needs(target, tmp_path):
    slots, needed = TARGETS[target]
    trainer = quiet_trainer(
        CountCollectives(tmp_path),
        strategy=DDPStrategy(start_method="fork", timeout=timedelta(seconds=30)),
        devices=2,
        max_steps=5,
        accumulate_grad_batches=2,
        limit_val_batches=0,
    )
    module = DiffusionModule(small_mlp(num_class_embeds=9), num_classes=8, **slots())
    trainer.fit(module, EightGaussians(4, num_samples=64, num_validation=8))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found == {"all_reduce": 1, **needed}


def asked_to_stop(rank):
    """What ranks learn of which only the second was asked, and of a trainer without a device."""
    stop = CoordinatedStop()
    stop._stop_asked = rank == 1
    trainer = SimpleNamespace(_signal_connector=SimpleNamespace(received_sigterm=False))
    stop.synchronize(trainer)
    return [trainer._signal_connector.received_sigterm, stop.is_synchronized()]


def test_the_signal_is_exchanged_without_the_device(on_two_ranks):
    assert on_two_ranks(asked_to_stop) == [[True, True], [True, True]]


def beside_another_backend(rank):
    """Which groups numbers go through where tensors go through a backend without a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda: "nccl")
        first = numbers_group()
        second = numbers_group()
    return {
        "is another": first is not dist.group.WORLD,
        "is kept": first is second,
        "backend": dist.get_backend(first),
        "numbers": all_gather_numbers([rank, 7]),
        "any": any_of_ranks([rank == 1, False]),
    }


def test_numbers_go_through_a_group_for_the_cpu_which_is_made_once(on_two_ranks):
    for found in on_two_ranks(beside_another_backend):
        assert found == {
            "is another": True,
            "is kept": True,
            "backend": "gloo",
            "numbers": [[0, 7], [1, 7]],
            "any": [True, False],
        }
