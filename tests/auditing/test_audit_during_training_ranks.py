"""Audits within a run on two ranks."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from support.ranks import launch
from support.trainers import quiet_trainer

from lightning_vr import (
    CARV,
    STF,
    AuditDuringTraining,
    Candidate,
    DiffusionModule,
    LearnedProposal,
    ResidualMLP,
)
from lightning_vr.data import EightGaussians

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

RIVALS = [
    Candidate("all", target=STF("all")),
    Candidate("q", draws=CARV(1, LearnedProposal(bins=2))),
]


def trained(*callbacks):
    """Return the weights and the random state after twelve steps."""
    torch.manual_seed(0)
    network = ResidualMLP(width=16, depth=1)
    torch.nn.init.normal_(network.project_out.weight, std=0.1)
    module = DiffusionModule(network, draws=CARV(1, LearnedProposal(bins=2)))
    strategy = DDPStrategy(timeout=timedelta(seconds=60))
    options = {"max_steps": 12, "limit_val_batches": 0, "strategy": strategy, "devices": 2}
    data = EightGaussians(batch_size=32, num_samples=320, num_validation=32)
    quiet_trainer(*callbacks, **options).fit(module, data)
    return [*module.parameters(), *module.buffers(), torch.get_rng_state()]


def test_the_clock_of_the_first_rank_decides_and_the_run_of_both_stays_the_same(tmp_path):
    def on_rank(rank):
        watch = AuditDuringTraining(RIVALS, repetitions=3)
        # by the clock of the second rank no audit is due
        watch._trained = 1e6 if rank == 0 else 0.0
        watched, plain = trained(watch), trained()
        is_same = all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))
        torch.save((is_same, watch.history.state()), tmp_path / f"{rank}.pt")

    launch(on_rank, 2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [is_same for is_same, _ in found] == [True, True]
    (_, first), (_, second) = found
    assert first == second
    assert len(first) >= 1
    assert set(first[0]["savings"]) == {"all", "q"}
