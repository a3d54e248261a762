import pytest
import torch

from lightning_vr.distributed import (
    all_gather_rows,
    all_reduce_sum,
    broadcast,
    rank,
    row_offset,
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
        "offset": row_offset(len(mine), mine.device),
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


def test_the_row_offset_is_where_a_ranks_rows_begin_in_the_gathered_ones(results):
    for found in results:
        start, mine = found["offset"], found["input"]
        assert torch.equal(found["uneven"][start : start + len(mine)], mine)


def test_sums_and_broadcasts_are_the_same_on_every_rank_and_change_no_input(results):
    for number, found in enumerate(results):
        assert found["sum"].tolist() == [100, 102]
        assert found["broadcast"].tolist() == [0, 1]
        assert torch.equal(found["input"], rows(3, 0) if number == 0 else rows(5, 100))
        assert found["place"] == [number, 2]


def test_on_one_process_collectives_are_the_identity():
    x = rows(3, 0)
    for collective in (all_gather_rows, all_reduce_sum, broadcast):
        assert collective(x) is x
    assert row_offset(3, x.device) == 0
    assert (rank(), world_size()) == (0, 1)
