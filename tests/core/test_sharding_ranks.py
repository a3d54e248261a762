"""Parameters that are sharded over two ranks, against the same parameters whole on each."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_vr.core.distributed import all_reduce_mean, broadcast
from lightning_vr.core.gradients import mean_gradients, mean_in_chunks
from lightning_vr.core.rng import generator
from lightning_vr.core.sharding import is_sharded, local, placed_like, shard, whole_weights
from lightning_vr.core.types import Clean, Times
from lightning_vr.variance.gradient_measurement import GradientMeasurement, NoisyLoss
from lightning_vr.variance.gradient_sums import GradientSums

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")

BATCH = 6


class Model(nn.Module):
    """Two blocks and the rest; 3 and 5 rows are no multiples of the number of ranks."""

    def __init__(self, rank=0):
        super().__init__()
        torch.manual_seed(rank)  # what rank 0 draws counts
        blocks = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)]
        self.register_buffer("mask", torch.tensor([True, False]))
        self.network = nn.Sequential(nn.Linear(3, 3), *blocks)

    def forward(self, rows):
        return self.network(rows["x"]).square().mean(dim=1)


def rows(rank):
    source = torch.Generator().manual_seed(10 + rank)
    return {"x": torch.randn(BATCH, 3, generator=source)}


def sharded(rank):
    model = Model(rank)
    mesh = init_device_mesh("cpu", (2,))
    shard(model, mesh, block_size=15)
    return model


def whole(parameters):
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in parameters]


def expected_gradients(rank):
    """The mean over ranks of the gradients of a model that each has whole."""
    model = Model()
    loss = model(rows(rank)).mean()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return [all_reduce_mean(x) for x in found]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    return True


def gradients_in_chunks(rank):
    expected = expected_gradients(rank)
    for chunk in (4, BATCH) if rank == 0 else (2, BATCH):  # 2 and 3 chunks, then one
        model = sharded(rank)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        for _ in range(2):  # gradients accumulate
            loss, _ = mean_in_chunks(model, model, rows(rank), chunk)
            (0.5 * loss).backward()
        assert close(whole(p.grad for p in model.parameters()), expected)
        _, found, _ = mean_gradients(model, model, rows(rank), chunk)
        assert close(whole(found), expected)
        assert close(whole(p.grad for p in model.parameters()), expected)


def weights_that_are_whole(rank):
    model, expected = sharded(rank), Model()
    assert close(whole(model.parameters()), [p.detach() for p in expected.parameters()])
    with torch.no_grad(), whole_weights(model):
        for _ in range(1 + 2 * rank):  # ranks call it differently often
            assert close([model(rows(0))], [expected(rows(0))])
    assert all(isinstance(p, DTensor) for p in model.parameters())
    shard(model, init_device_mesh("cpu", (2,)), block_size=1)  # stays as it is
    for parameter in model.parameters():
        x = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        placed = placed_like(x, parameter)
        assert local(placed).shape == local(parameter).shape
        assert torch.equal(placed.full_tensor(), x)


class Loss(NoisyLoss):
    """A loss of noise that is drawn again."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def times(self, clean, source, low, high):
        t = torch.rand(len(clean.x0), generator=source)
        return Times(t, torch.ones_like(t))

    def draw(self, clean, times, source):
        noise = torch.randn(clean.x0.shape, generator=source)
        return {"x": clean.x0 + times.t[:, None] * noise}

    def forward(self, rows):
        return self.model(rows)


def components_by_differences(rank):
    """A unit of sharded gradients is a batch of all ranks, of twice as many samples."""
    source = partial(generator, rank)
    batches = [Clean(rows(rank + 2 * i)["x"]) for i in range(3)]
    model = Model()
    groups = [0, 0, 0, 1, 1, 1]
    measurement = GradientMeasurement(Loss(model), source, groups)
    sums = GradientSums(groups)
    for unit, clean in enumerate(batches):
        draws = measurement._draws(clean, ("key", unit), 0.0, 1.0)
        passes = [measurement.gradient(each, "key", unit) for each in draws]
        sums.add([all_reduce_mean(torch.stack(each)) for each in zip(*passes, strict=True)])
    expected = sums.components().scaled(2 * BATCH)
    split = GradientMeasurement(Loss(sharded(rank)), source, groups)
    found = split.by_differences(batches, "key")
    assert split.why_unavailable(batches[0]) == "the weights are sharded"
    # differences of products of float32 gradients
    rounding = {"rtol": 1e-4, "atol": 1e-5 * float(expected.total[0])}
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), **rounding)


def what_is_gathered_by_itself(rank):
    """A module that is never called is opened, and so is one that wraps all of another."""
    outer = nn.Module()
    outer.holder = nn.Module()
    outer.holder.model, outer.teacher = Model(rank), nn.Linear(9, 9).requires_grad_(False)
    shard(outer, init_device_mesh("cpu", (2,)), block_size=15)
    found = {name for name, part in outer.named_modules() if isinstance(part, FSDPModule)}
    blocks = {"holder.model.network.1", "holder.model.network.3"}
    assert found == {"holder.model", *blocks}
    assert not any(isinstance(p, DTensor) for p in outer.teacher.parameters())
    outer.holder.model(rows(rank)).mean().backward()
    assert close(whole(p.grad for p in outer.holder.parameters()), expected_gradients(rank))


def refusals(rank):
    model = Model()
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="`scale` is in the Model itself"):
        shard(model, init_device_mesh("cpu", (2,)), block_size=1)
    assert not is_sharded(model)

    shared = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    shared["b"].weight = shared["a"].weight
    number = nn.ModuleDict({"a": nn.Linear(2, 2)})
    number["a"].scale = nn.Parameter(torch.tensor(1.0))
    for model, message in ((shared, "is in the Linear too"), (number, "`scale` .* single number")):
        with pytest.raises(ValueError, match=message):
            shard(model, init_device_mesh("cpu", (2,)), block_size=1)
        assert not is_sharded(model)


def other_layouts(rank):
    """Weights that are not contiguous, as those of images in channels_last, have rows too."""
    model = nn.Sequential(nn.Linear(2, 3))
    expected = model[0].weight.detach().clone()
    model[0].weight = nn.Parameter(expected.T.contiguous().T)
    shard(nn.ModuleList([model]), init_device_mesh("cpu", (2,)), block_size=1)
    assert torch.equal(model[0].weight.full_tensor(), broadcast(expected))


CLAIMS = [
    gradients_in_chunks,
    weights_that_are_whole,
    components_by_differences,
    what_is_gathered_by_itself,
    refusals,
    other_layouts,
]


def every_claim(rank):
    for claim in CLAIMS:
        claim(rank)
    return torch.ones(1)


def test_sharded_gradients_weights_and_variances_are_those_of_whole_parameters(on_two_ranks):
    # one start of two processes for all claims
    assert on_two_ranks(every_claim) == [torch.ones(1)] * 2
