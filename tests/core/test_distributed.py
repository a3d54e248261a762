import gc
import weakref

import pytest
import torch
import torch.distributed as dist

from lightning_vr.core.distributed import (
    all_gather_numbers,
    all_gather_rows,
    all_reduce_sum,
    any_of_ranks,
    broadcast,
    destroy_process_group,
    exchange_rows,
    gather_rows,
    leave_ranks,
    process_count,
    rank,
    ranks_save_together,
    row_counts,
    world_size,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")


def rows(count, start, dtype=torch.float64):
    return torch.arange(start, start + 2 * count).reshape(count, 2).to(dtype)


def every_collective(number):
    """What each collective returns on this rank, which has 3 rows or 5."""
    mine = rows(3, 0) if number == 0 else rows(5, 100)
    leaf = mine.clone().requires_grad_()
    gathered = all_gather_rows(leaf)
    return {
        "uneven": gathered.detach(),
        "needs gradient": gathered.requires_grad,
        "integers": all_gather_rows(mine[:, 0].long()),
        "one rank empty": all_gather_rows(mine[:0] if number == 0 else mine),
        "half": all_gather_rows(mine.bfloat16()),
        "counts": row_counts(len(mine)),
        "counted": gather_rows(mine, [3, 5]),
        "numbers": all_gather_numbers([number, 7]),
        "any": any_of_ranks([number == 0, False, True]),
        # of six rows the first rank gets two and the second four
        "exchanged": exchange_rows(rows(6, 100 * number), [2, 4]),
        "to one": exchange_rows(rows(1, 100 * number), [1, 0]),
        "sum": all_reduce_sum(mine[0]),
        "broadcast": broadcast(mine[0]),
        "input": mine,
        "place": [rank(), world_size()],
    }


@pytest.fixture(scope="module")
def results(on_two_ranks):
    return on_two_ranks(every_collective)


def test_rows_of_all_ranks_are_gathered_in_rank_order_however_many_each_has(results):
    whole = torch.cat([rows(3, 0), rows(5, 100)])
    for found in results:
        assert torch.equal(found["uneven"], whole)
        assert torch.equal(found["integers"], whole[:, 0].long())
        assert torch.equal(found["half"], whole.bfloat16())
        assert torch.equal(found["one rank empty"], whole[3:])
        assert not found["needs gradient"]


def test_rows_of_known_counts_and_numbers_are_gathered_in_rank_order(results):
    for found in results:
        assert torch.equal(found["counted"], found["uneven"])
        assert found["numbers"] == [[0, 7], [1, 7]]
        assert found["counts"] == [3, 5]
        assert found["any"] == [True, False, True]


def test_rows_are_exchanged_so_that_each_rank_has_what_all_have_sent_it(results):
    first, second = results
    assert torch.equal(first["exchanged"], torch.stack([rows(2, 0), rows(2, 100)]))
    assert torch.equal(second["exchanged"], torch.stack([rows(4, 4), rows(4, 104)]))
    assert torch.equal(first["to one"], torch.stack([rows(1, 0), rows(1, 100)]))
    assert second["to one"].shape == (2, 0, 2)


def test_sums_and_broadcasts_are_the_same_on_every_rank_and_change_no_input(results):
    for number, found in enumerate(results):
        assert found["sum"].tolist() == [100, 102]
        assert found["broadcast"].tolist() == [0, 1]
        assert torch.equal(found["input"], rows(3, 0) if number == 0 else rows(5, 100))
        assert found["place"] == [number, 2]


def left(number):
    """What a rank that has left the other gets, which takes part in nothing more."""
    dist.barrier()  # a rank that ends at once would let the other fail to connect
    if number == 1:
        return None
    leave_ranks()
    return {
        "gathered": all_gather_rows(rows(3, 0)),
        "numbers": all_gather_numbers([7]),
        "any": any_of_ranks([False]),
        "torch": dist.is_initialized(),
        "place": [rank(), world_size(), process_count()],
        "together": ranks_save_together(),
    }


def test_on_a_rank_that_has_left_collectives_are_the_identity(on_two_ranks):
    found, _ = on_two_ranks(left)
    assert torch.equal(found.pop("gathered"), rows(3, 0))
    assert found == {
        "numbers": [[7]],
        "any": [False],
        "torch": False,
        "place": [0, 1, 2],
        "together": False,
    }


def test_on_one_process_collectives_are_the_identity():
    x = rows(3, 0)
    for collective in (all_gather_rows, all_reduce_sum, broadcast):
        assert collective(x) is x
    assert row_counts(3) == [3]
    assert gather_rows(x, [3]) is x
    assert torch.equal(exchange_rows(x, [3]), x[None])
    assert all_gather_numbers([4, 2]) == [[4, 2]]
    assert (rank(), world_size()) == (0, 1)


def group_outlives_its_end(number):
    """Whether the process group of a rank is still there once it was destroyed."""
    any_of_ranks([True])
    group = weakref.ref(dist.group.WORLD)
    destroy_process_group()
    gc.collect()
    return group() is not None


def test_nothing_keeps_a_process_group_that_is_destroyed(on_two_ranks):
    """Gloo's threads would outlive the interpreter, which aborts a job that was done."""
    assert on_two_ranks(group_outlives_its_end) == [False, False]
