"""What teachers train on two ranks, sharded beside whole teachers, against DDP."""

import pytest
import torch
from scenes import VIEWS, fit, scene, teacher
from support.ranks import launch
from torch.distributed.tensor import DTensor

from lightning_vr import CARV, DistributionMatching, LearnedProposal, ShardedStrategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified"),
]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


def distilled():
    return scene(CARV(2, LearnedProposal(bins=2)), views=VIEWS, optimizer=sgd)


def matched():
    module = DistributionMatching(
        teacher(prediction="x0"),
        draws=CARV(2, LearnedProposal(bins=2)),
        fake_steps=2,
        optimizer=sgd,
    )
    with torch.no_grad():  # else the fake scores are the teacher's
        module.fake.network.project_out.bias.add_(0.5)
    return module


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def sharded_as_ddp(_):
    for build in (distilled, matched):
        found = []
        for strategy in ("ddp_find_unused_parameters_true", ShardedStrategy(block_size=20)):
            module = build()
            start = {name: p.detach().clone() for name, p in trained(module).items()}
            fit(module, strategy=strategy, devices=2, length=4)
            is_sharded = isinstance(strategy, ShardedStrategy)
            assert all(isinstance(p, DTensor) == is_sharded for p in trained(module).values())
            assert not any(isinstance(p, DTensor) for p in module.teacher.parameters())
            whole = [p.full_tensor() if is_sharded else p for p in trained(module).values()]
            found.append([p.detach() for p in whole])
            assert not any(map(torch.equal, found[-1], start.values())), build
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert all(len(module.sample(count)) == count for count in (1, 3))


def test_students_and_scenes_are_sharded_beside_teachers_that_stay_whole():
    launch(sharded_as_ddp, 2)
