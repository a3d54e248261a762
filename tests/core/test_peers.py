"""What ranks tell one another of their end, where no collective can."""

import pytest
from torch.distributed import HashStore

from lightning_vr.core import peers
from lightning_vr.core.peers import announce_end, announce_stop, is_stop_announced, lost_rank

LOST = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:4711.")


@pytest.fixture
def as_rank(monkeypatch):
    """Make this process one of three ranks that share a store."""
    store = HashStore()
    monkeypatch.setattr(peers, "_get_default_store", lambda: store)
    monkeypatch.setattr(peers, "process_count", lambda: 3)
    return lambda number: monkeypatch.setattr(peers, "rank", lambda: number)


def test_a_rank_that_has_lost_another_knows_which_has_ended_first(as_rank):
    as_rank(2)
    announce_end()
    as_rank(0)
    assert lost_rank(LOST) == "rank 2"
    announce_end(lost_rank(LOST))
    announce_end()  # the first call counts
    as_rank(1)
    assert lost_rank(LOST) == "rank 2"


def test_a_rank_that_was_killed_has_no_number(as_rank):
    as_rank(1)
    assert lost_rank(LOST) == "another rank"


def test_without_the_store_rank_zero_has_ended(as_rank, monkeypatch):
    class Gone:
        def check(self, keys):
            raise RuntimeError("failed to recv, got 0 bytes")

    monkeypatch.setattr(peers, "_get_default_store", Gone)
    as_rank(2)
    assert lost_rank(LOST) == "rank 0"
    assert not is_stop_announced()


def test_another_error_is_not_the_end_of_another_rank(as_rank):
    as_rank(1)
    assert lost_rank(RuntimeError("shapes differ")) is None
    assert lost_rank(ValueError("Connection closed by peer")) is None


def test_an_error_that_was_raised_from_a_loss_is_one(as_rank):
    as_rank(1)
    error = ValueError("no metrics")
    error.__cause__ = LOST
    assert lost_rank(error) == "another rank"


def test_all_ranks_hear_that_one_was_asked_to_stop(as_rank):
    as_rank(1)
    assert not is_stop_announced()
    announce_stop()
    as_rank(0)
    assert is_stop_announced()


def test_on_one_process_nothing_is_told():
    announce_end()
    announce_stop()
    assert not is_stop_announced()
    assert lost_rank(LOST) is None
