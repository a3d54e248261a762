"""References that are drawn from files are read in the step before, and nothing else changes."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from support.forks import exit_code
from support.latents import write_cache
from support.networks import small_mlp
from support.ranks import launch
from support.stops import StopAt, StoppedError
from support.trainers import quiet_trainer
from torch import nn

from lightning_vr import CARV, STF, DiffusionModule, LearnedProposal
from lightning_vr.data import CachedLatents
from lightning_vr.posterior import StoredReferences
from lightning_vr.training import module as training_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
]

DRAWN, EPOCHS, BATCHES = 7, 2, 5
MEAN = torch.randn(26, 2, generator=torch.Generator().manual_seed(0))


class Targets(Callback):
    """Keeps the target of each micro-step."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.found.append(module.estimate.target.x0)


def fit(folder, *callbacks, ckpt_path=None, posterior="mean", stf=None, slots=dict, **options):
    """A fit of five batches an epoch; all targets, and the weights at its end."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = small_mlp(num_class_embeds=4)
    target, seen = STF(DRAWN, **(stf or {"storage": "data"})), Targets()
    module = DiffusionModule(network, target=target, num_classes=3, **slots())
    data = CachedLatents(str(folder), batch_size=5, posterior=posterior)
    trainer = quiet_trainer(seen, *callbacks, **({"max_epochs": EPOCHS} | options))
    torch.manual_seed(5)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return [*seen.found, nn.utils.parameters_to_vector(module.parameters()).detach()]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "cache", MEAN, 0.1 + 0 * MEAN, shard_size=9, label=torch.arange(26) % 3)
    return tmp_path / "cache"


def as_drawn(patch):
    patch.setattr(training_module, "prefetch_references", lambda *_: None)


def record(patch):
    """Return a list of ``"ahead"`` where the thread reads, and ``"own"`` where a step does."""
    reads, gather = [], StoredReferences._gather

    def recorded(self, index):
        is_own = threading.current_thread() is threading.main_thread()
        reads.append("own" if is_own else "ahead")
        return gather(self, index)

    patch.setattr(StoredReferences, "_gather", recorded)
    patch.setattr(STF, "compare", lambda *_: None)  # it reads copies of the first batch
    return reads


@pytest.fixture
def both(monkeypatch):
    """Fit with and without reading ahead; the reads of the first, and what both have found."""

    def run(*args, **options):
        with monkeypatch.context() as patch:
            reads = record(patch)
            ahead = fit(*args, **options)
        with monkeypatch.context() as patch:
            as_drawn(patch)
            return reads, ahead, fit(*args, **options)

    return run


@pytest.mark.parametrize("window", [1, 2, 3])
def test_all_but_the_first_are_read_in_the_step_before_and_the_numbers_are_the_same(
    cache, both, window
):
    """Windows of two and three batches are cut short at the end of an epoch."""
    reads, ahead, drawn = both(cache, accumulate_grad_batches=window, val_check_interval=2)
    assert reads.count("own") == 1
    assert reads.count("ahead") == EPOCHS * BATCHES  # the last is for a step that never comes
    assert same(ahead, drawn)


def test_what_is_drawn_before_references_is_foretold_for_all_draws(cache, both):
    def slots():
        draws = CARV(4, LearnedProposal(), antithetic=True)
        return {"draws": draws, "label_dropout": 0.3}

    reads, ahead, drawn = both(cache, slots=slots, accumulate_grad_batches=2)
    assert reads.count("own") == 1
    assert same(ahead, drawn)


class Begun(Callback):
    """Counts, at the end of each micro-step, how many reads the thread was given."""

    def __init__(self, patch):
        self.count, self.counts, prefetch = 0, [], StoredReferences.prefetch

        def counted(bank, index):
            self.count += 1
            prefetch(bank, index)

        patch.setattr(StoredReferences, "prefetch", counted)

    def on_train_batch_end(self, *args):
        self.counts.append(self.count)


def test_each_step_gives_the_thread_one_read_before_it_ends(cache, monkeypatch):
    begun = Begun(monkeypatch)
    fit(cache, begun, max_epochs=1)
    assert begun.counts == list(range(1, BATCHES + 1))


@pytest.mark.parametrize("batches", [3, 5, 7])
def test_a_run_that_resumes_reads_its_first_and_goes_on_as_it_would_have(
    cache, tmp_path, monkeypatch, batches
):
    whole, path = fit(cache, accumulate_grad_batches=2), tmp_path / "stopped.ckpt"
    with pytest.raises(StoppedError):
        fit(cache, StopAt("on_train_batch_end", batches, path), accumulate_grad_batches=2)
    reads = record(monkeypatch)
    resumed = fit(cache, ckpt_path=path, accumulate_grad_batches=2)
    assert reads.count("own") == 1
    assert same(resumed, whole[batches:])


def test_what_was_read_of_a_bank_is_not_used_once_it_is_filled_again(cache, both):
    options = {"posterior": "sample", "stf": {"dtype": "bfloat16"}}
    reads, ahead, drawn = both(cache, **options)
    assert reads.count("own") == EPOCHS
    assert same(ahead, drawn)


def test_a_bank_in_memory_gives_the_thread_nothing_to_read(cache, monkeypatch):
    begun = Begun(monkeypatch)
    memory = fit(cache, begun, stf={"storage": "memory"})
    assert set(begun.counts) == {0}
    for one, other in zip(memory, fit(cache), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_error_of_the_thread_is_raised_in_the_step_that_needs_what_it_reads(cache, monkeypatch):
    gather, targets = StoredReferences._gather, Targets()

    def failing(self, index):
        if threading.current_thread() is not threading.main_thread() and len(targets.found) >= 2:
            raise OSError("the disk is gone")
        return gather(self, index)

    monkeypatch.setattr(StoredReferences, "_gather", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        fit(cache, targets)
    assert len(targets.found) in (2, 3)  # the thread began the read before or after the second


@pytest.fixture
def waiting(monkeypatch):
    """A bank whose thread reads once ``go`` is set."""
    go, gather = threading.Event(), StoredReferences._gather

    def gather_later(self, index):
        if threading.current_thread() is not threading.main_thread():
            go.wait()
        return gather(self, index)

    monkeypatch.setattr(StoredReferences, "_gather", gather_later)
    yield StoredReferences.prepare([MEAN[:9], MEAN[9:]]), go
    go.set()


def assert_taken(bank, index):
    torch.testing.assert_close(bank.take(index).rows + bank.centre, MEAN[index])


def test_references_are_copied_and_pickled_while_they_are_read(waiting):
    (bank, go), index = waiting, torch.tensor([20, 3, 9])
    bank.prefetch(index)
    target = STF(3, storage="data")
    target.set_bank(bank, indexed=True)
    assert copy.deepcopy(target).bank is bank
    for copied in (pickle.loads(pickle.dumps(target)).bank, pickle.loads(pickle.dumps(bank))):
        assert_taken(copied, index)
    go.set()
    assert_taken(bank, index)


def test_other_references_than_those_that_were_begun_are_read_anew():
    bank = StoredReferences.prepare([MEAN[:9], MEAN[9:]])
    asked, begun = torch.tensor([20, 3, 9]), torch.tensor([20, 3, 8])
    bank.prefetch(begun)
    assert_taken(bank, asked)
    assert_taken(bank, begun)
    bank.prefetch(begun)
    rows = torch.cat([rows + bank.centre for _, rows, _ in bank.chunks(10, 1, torch.float32)])
    torch.testing.assert_close(rows, MEAN)


def test_a_process_ends_while_references_are_read(waiting):
    bank, go = waiting

    def end_in_the_middle():
        bank.prefetch(torch.tensor([3]))
        threading._register_atexit(go.set)

    assert exit_code(end_in_the_middle, 60) == 0


def on_rank(rank, folder):
    """Fits of a bank in shards and of whole ones, with and without reading ahead."""
    found = []
    for sharded in (True, False):
        options = {"strategy": "ddp", "devices": 2, "stf": {"storage": "data", "sharded": sharded}}
        with pytest.MonkeyPatch.context() as patch:
            reads = record(patch)
            ahead = fit(folder, **options)
        with pytest.MonkeyPatch.context() as patch:
            as_drawn(patch)
            drawn = fit(folder, **options)
        assert same(ahead, drawn)
        assert reads.count("own") == 1
        assert reads.count("ahead") == len(ahead) - 1 > 1
        found.append(ahead)
    assert not same(*found)  # ranks draw the same references of shards, and their own of whole ones


def test_two_ranks_read_ahead_and_their_numbers_are_the_same(cache):
    launch(partial(on_rank, folder=cache), 2)
