import pytest
import torch

from lightning_vr.core.distributed import world_size
from lightning_vr.variance.excess_loss import ExcessLoss
from lightning_vr.variance.irreducible_variance import IrreducibleVariance
from lightning_vr.variance.target_measurement import measure_target_variance

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")


def step(rank, number):
    source = torch.Generator().manual_seed(2 * number + rank)
    level = torch.exp(torch.randn(20 + rank, generator=source))
    return level, torch.rand(20 + rank, generator=source), torch.ones(20 + rank)


def excess_of(ranks):
    """Three steps, the state saved and loaded with some draws not taken in yet."""
    x0 = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    levels = torch.logspace(-1, 1, 4, dtype=torch.float64)
    variance = IrreducibleVariance(measure_target_variance(x0, levels, [8], blocks=4), 8)
    excess = ExcessLoss(variance)
    for number in range(3):
        for rank in ranks:
            excess.add(*step(rank, number))
        excess.advance()
    return torch.stack([*excess.by_level(), *[x.expand(4) for x in excess.total()]])


def resumed_draws(rank):
    """Ranks load one state: what it holds of rank 0 must not count once for each of them."""
    levels = torch.logspace(-1, 1, 4, dtype=torch.float64)
    x0 = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    variance = IrreducibleVariance(measure_target_variance(x0, levels, [8], blocks=4), 8)
    state = {"sums": torch.zeros(8, 5).double(), "recent": torch.ones(8, 5).double()}
    assert world_size() == 2
    excess = ExcessLoss(variance, state)
    excess.advance()
    return excess.by_level().draws


@pytest.fixture(scope="module")
def results(on_two_ranks):
    return on_two_ranks(lambda rank: (excess_of([rank]), resumed_draws(rank)))


def test_two_ranks_have_the_excess_loss_of_one_process_on_all_draws(results):
    expected = excess_of([0, 1])
    assert not expected.isnan().any()
    for found, _ in results:
        torch.testing.assert_close(found, expected)


def test_draws_that_a_checkpoint_holds_count_once_however_many_ranks_load_it(results):
    for _, draws in results:
        assert draws.tolist() == [1, 1, 1, 1]
