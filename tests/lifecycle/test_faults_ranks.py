"""What one rank alone meets, all act on alike."""

import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_vr.core.distributed import SynchronizedError, rank
from lightning_vr.lifecycle.checkpoint_io import DurableCheckpointIO
from lightning_vr.lifecycle.finite_guard import FiniteGuard

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")

TRAINER = SimpleNamespace(precision_plugin=None, global_step=5)


def network():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def is_step_made(_):
    guard, model, made = FiniteGuard("skip"), network(), []
    warnings.simplefilter("ignore")
    for step in range(3):
        guard.begin_step()
        # infinite on rank 1 in step 1, where its gradient is finite
        is_bad = step == 1 and rank() == 1
        guard.add_loss(torch.tensor(torch.inf if is_bad else 1.0))
        made.append(guard.check(TRAINER, model))
    return made


def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_on_both(on_two_ranks):
    assert on_two_ranks(is_step_made) == [[True, False, True]] * 2


def what_breaks(_):
    guard, model = FiniteGuard("skip"), network()
    model[0].bias.grad.fill_(torch.nan)  # as on all ranks under DDP
    if rank() == 1:
        model[1].running_mean.fill_(torch.nan)
    try:
        guard.check(TRAINER, model)
    except SynchronizedError as error:
        return str(error)


def test_running_statistics_that_one_rank_breaks_end_both(on_two_ranks):
    found = on_two_ranks(what_breaks)
    assert found[0] == found[1]
    assert "the weight `1.running_mean`" in found[0]


def how_it_ends(_):
    tempfile.tempdir = None
    files = DurableCheckpointIO()
    dumped = []

    def dump_checkpoint(weights_only):
        dumped.append(rank())
        return {"global_step": 5}

    folder = tempfile.mkdtemp()
    trainer = SimpleNamespace(
        _checkpoint_connector=SimpleNamespace(dump_checkpoint=dump_checkpoint),
        lightning_module=network(),
        default_root_dir=folder,
    )
    files.begin(trainer)
    files.finish(trainer)  # nothing was lost
    files.begin(trainer)
    if rank() == 0:
        files._unwritten[Path("/proc/nowhere")] = "/proc/nowhere/last.ckpt", "no space"
    try:
        files.finish(trainer)
    except SynchronizedError as error:
        return str(error), dumped


def test_a_checkpoint_that_rank_0_could_not_write_is_an_error_on_both(on_two_ranks):
    (first, dumped), (second, too) = on_two_ranks(how_it_ends)
    assert first == second
    assert first.startswith("The last checkpoint, /proc/nowhere/last.ckpt, could not be written")
    assert (dumped, too) == ([0], [1])
