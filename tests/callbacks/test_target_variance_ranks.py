"""Target variance, whose blocks of samples the ranks share out."""

import pytest
import torch

from lightning_vr.variance.target_measurement import measure_target_variance

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")


def measured(blocks):
    x0 = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    levels = torch.logspace(-1, 1, 4, dtype=torch.float64)
    curve = measure_target_variance(x0, levels, [8], samples=12, blocks=blocks)
    return torch.stack([curve.dsm.mean, curve.dsm.error, curve.stf[8].mean, curve.ess[8].mean])


@pytest.mark.parametrize("blocks", [2, 4])
def test_ranks_that_have_few_blocks_or_none_get_the_curve_of_one_process(blocks, on_ranks):
    for found in on_ranks(lambda rank: measured(blocks), world_size=3):
        assert torch.equal(found, measured(blocks))
