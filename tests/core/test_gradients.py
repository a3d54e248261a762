import functools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_vr.core.gradients import mean_in_chunks
from lightning_vr.core.rng import generator
from lightning_vr.core.sharded_gradients import sharded_gradients
from lightning_vr.core.types import Clean
from lightning_vr.estimators.carv import CARV
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.training.module import DiffusionModule

WIDE = torch.float64
ROWS = 7
chunks = pytest.mark.parametrize("chunk", [1, 3, ROWS, 50])


class Model(nn.Module):
    """A network with shared, summed, frozen and unused parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.low_rank = nn.Parameter(torch.randn(4, 4))
        self.level = nn.Parameter(torch.randn(2))
        self.tied = self.first.bias
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(5))
        self.to(WIDE)
        self.seen = []

    def losses(self, rows):
        x = rows["x"]
        self.seen.append(len(x))
        hidden = torch.tanh(self.first(x)) + self.tied
        hidden = torch.tanh(hidden @ (self.second.weight + self.low_rank)) * self.frozen
        return rows["more"]["weight"] * hidden.square().sum(1) + self.level.sum() * x[:, 0]


@pytest.fixture(autouse=True)
def no_seed_moves():
    with torch.random.fork_rng():
        yield


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def rows(source):
    x = torch.randn(ROWS, 3, generator=source, dtype=WIDE)
    return {"x": x, "more": {"weight": torch.rand(ROWS, generator=source, dtype=WIDE)}}


def gradients(loss, inputs):
    return torch.autograd.grad(loss, list(inputs), allow_unused=True)


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-12, "atol": 1e-12}))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@chunks
def test_losses_and_gradients_are_those_of_plain_autograd(model, rows, chunk):
    expected = model.losses(rows)
    loss, per_draw = mean_in_chunks(model, model.losses, rows, chunk)
    torch.testing.assert_close(per_draw, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-12, atol=1e-12)
    assert not per_draw.requires_grad
    found = gradients(loss, trainable(model))
    assert_same(found, gradients(expected.mean(), trainable(model)))
    assert sum(g is None for g in found) == 2


@chunks
def test_rows_that_require_a_gradient_get_one(model, rows, chunk):
    rows["x"].requires_grad_()
    rows["more"]["weight"].requires_grad_()
    sources = [rows["x"], rows["more"]["weight"]]
    expected = gradients(model.losses(rows).mean(), sources)
    loss, _ = mean_in_chunks(model, model.losses, rows, chunk)
    assert_same(gradients(loss, sources), expected)


@pytest.mark.parametrize("count", [1, 40])
def test_an_upstream_network_has_one_backward_pass(model, source, count):
    trunk = nn.Linear(2, 3).to(WIDE)
    given = torch.randn(5, 2, generator=source, dtype=WIDE)
    noise = torch.randn(5 * count, 3, generator=source, dtype=WIDE)
    passes = []

    def rows():
        hidden = trunk(given)
        hidden.register_hook(passes.append)
        x = hidden.repeat_interleave(count, 0) + noise
        # the same tensor twice, as a sample is its own target
        return {"x": x, "more": {"weight": x.square().sum(1)}}

    inputs = [*trunk.parameters(), *trainable(model)]
    expected = gradients(model.losses(rows()).mean(), inputs)
    passes.clear()
    loss, _ = mean_in_chunks(model, model.losses, rows(), 2)
    assert not passes
    assert_same(gradients(loss, inputs), expected)
    assert len(passes) == 1


def test_gradients_reach_the_parameters_in_backward_alone_and_are_added(model, rows):
    loss, _ = mean_in_chunks(model, model.losses, rows, 2)
    assert all(p.grad is None for p in model.parameters())
    before = [torch.ones_like(p) for p in trainable(model)]
    for p, ones in zip(trainable(model), before, strict=True):
        p.grad = ones.clone()
    (3 * loss).backward()
    expected = gradients(3 * model.losses(rows).mean(), trainable(model))
    expected = [1 + (0 * b if g is None else g) for g, b in zip(expected, before, strict=True)]
    assert_same([p.grad for p in trainable(model)], expected)
    assert model.frozen.grad is None


@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.3])
def test_the_scale_does_not_change_the_gradient(model, rows, scale):
    expected = gradients(model.losses(rows).mean(), trainable(model))
    loss, _ = mean_in_chunks(model, model.losses, rows, 2, scale=scale)
    assert_same(gradients(loss, trainable(model)), expected)


def test_the_scale_keeps_gradients_that_float16_cannot_hold(source):
    layer = nn.Linear(3, 1, bias=False)
    rows = {"x": torch.randn(8, 3, generator=source)}

    def losses(rows):
        output = rows["x"].half() @ layer.weight.half().T
        return 1e-8 * output.squeeze(1).float()

    found = [
        gradients(mean_in_chunks(layer, losses, rows, 1, scale=scale)[0], layer.parameters())[0]
        for scale in (1.0, 2.0**16)
    ]
    assert not found[0].any()
    torch.testing.assert_close(found[1], 1e-8 * rows["x"].mean(0)[None], rtol=1e-2, atol=1e-10)


@chunks
def test_without_gradients_the_losses_are_the_same(model, rows, chunk):
    with torch.no_grad():
        loss, per_draw = mean_in_chunks(model, model.losses, rows, chunk)
        expected = model.losses(rows)
    torch.testing.assert_close(per_draw, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-12, atol=1e-12)
    assert not loss.requires_grad


@chunks
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad], ids=["gradients", "none"])
def test_each_row_passes_once_in_chunks_of_at_most_the_given_size(model, rows, chunk, mode):
    with mode():
        mean_in_chunks(model, model.losses, rows, chunk)
    assert max(model.seen) == min(chunk, ROWS)
    assert sum(model.seen) == ROWS


@chunks
def test_sharded_and_whole_parameters_have_the_same_chunks_which_dropout_draws_for(
    model, rows, chunk
):
    mean_in_chunks(model, model.losses, rows, chunk)
    seen = list(model.seen)
    sharded_gradients(model, model.losses, rows, chunk)
    assert model.seen == 2 * seen


def test_the_memory_of_activations_is_that_of_one_chunk(model, rows):
    held, most = [0], [0]

    class Held:
        def __init__(self, x):
            self.x = x.detach()
            held[0] += x.numel()
            most[0] = max(most[0], held[0])

        def __del__(self):
            held[0] -= self.x.numel()

    def peak(loss_of, count):
        many = {"x": rows["x"].repeat(count, 1)}
        many["more"] = {"weight": rows["more"]["weight"].repeat(count)}
        most[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.x):
            loss_of(many)
        assert held[0] == 0
        return most[0]

    def in_chunks(rows):
        return mean_in_chunks(model, model.losses, rows, ROWS)

    assert peak(in_chunks, 10) == peak(in_chunks, 1) > 0
    assert peak(lambda rows: model.losses(rows).mean(), 10) > 3 * peak(in_chunks, 10)


def test_it_cannot_be_differentiated_twice(model, rows):
    loss, _ = mean_in_chunks(model, model.losses, rows, 2)
    factor = torch.ones((), dtype=WIDE, requires_grad=True)
    (gradient,) = torch.autograd.grad(factor * loss, [model.first.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        loss.backward()


def test_under_autocast_it_is_plain_autograd_to_the_precision_of_bfloat16(source):
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    rows = {"x": torch.randn(12, 8, generator=source)}

    def losses(rows):
        return network(rows["x"]).float().square().squeeze(1)

    with torch.autocast("cpu", torch.bfloat16):
        loss, per_draw = mean_in_chunks(network, losses, rows, 5)
        expected = losses(rows)
    torch.testing.assert_close(per_draw, expected, rtol=0.02, atol=0.02)
    found = gradients(loss, network.parameters())
    assert all(g.dtype == torch.float32 for g in found)
    assert_same(found, gradients(expected.mean(), network.parameters()), rtol=0.05, atol=0.02)
    exact = gradients(losses(rows).mean(), network.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


class InFloat32(nn.Module):
    """A network that disables autocast in its forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.inner(x.float())


def test_what_a_network_does_in_float32_is_differentiated_in_float32(source):
    network, rows = InFloat32(), {"x": torch.randn(12, 8, generator=source)}

    def losses(rows):
        return network(rows["x"]).square().squeeze(1)

    expected = gradients(losses(rows).mean(), network.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = mean_in_chunks(network, losses, rows, 5)
    assert_same(gradients(loss, network.parameters()), expected, rtol=1e-5, atol=1e-7)


def test_checkpointed_networks_run_again_with_the_same_parameters(model, rows):
    def losses(rows):
        hidden = checkpoint(model.first, rows["x"], use_reentrant=False)
        return torch.tanh(hidden).square().sum(1)

    expected = gradients(losses(rows).mean(), model.first.parameters())
    loss, _ = mean_in_chunks(model, losses, rows, 2)
    assert_same(gradients(loss, model.first.parameters()), expected)


class Encoding(DiffusionModule):
    """Holds an upstream layer that is trained with the network."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.encoder = nn.Linear(3, 2)

    def encode(self, batch):
        x, label = batch
        return Clean(self.encoder(x), label)


class Direct(DiffusionModule):
    def encode(self, batch):
        x, label = batch
        return Clean(x[:, :2], label)


SOURCE = generator("batches of chunks")
POINTS = torch.randn(48, 3, generator=SOURCE)
LABELS = torch.randint(2, (48,), generator=SOURCE)


def module(kind, chunk_size, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP(2, width=8, depth=1, num_class_embeds=3)
        nn.init.normal_(network.project_out.weight)
    optimizer = functools.partial(torch.optim.SGD, lr=0.05)
    draws = CARV(4, chunk_size=chunk_size, **options)
    return kind(network, num_classes=2, label_dropout=0.2, draws=draws, optimizer=optimizer)


kinds = pytest.mark.parametrize("kind", [Direct, Encoding])


@kinds
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 31, 32, 100])
def test_the_loss_of_a_module_does_not_depend_on_the_chunk_size(kind, chunk_size):
    found = []
    for size in (None, chunk_size):
        model = module(kind, size, antithetic=True)
        estimate = model.loss((POINTS[:8], LABELS[:8]), generator(1))
        estimate.loss.backward()
        gradient = [p.grad for p in model.parameters()]
        found.append((estimate.loss.detach(), estimate.per_draw.detach(), gradient))
    (loss, per_draw, gradient), (other, other_per_draw, other_gradient) = found
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(other_per_draw, per_draw)
    assert_same(other_gradient, gradient, rtol=1e-4, atol=1e-6)
    assert all(g is not None for g in gradient)


def trained(kind, chunk_size, accumulation):
    model = module(kind, chunk_size)
    model.seed = 5
    loader = DataLoader(list(zip(POINTS, LABELS, strict=True)), batch_size=8)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    assert trainer.global_step == 3
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@kinds
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_training_does_not_depend_on_the_chunk_size(kind, accumulation):
    start = nn.utils.parameters_to_vector(module(kind, None).parameters()).detach()
    expected = trained(kind, None, accumulation)
    assert float((expected - start).abs().max()) > 1e-3
    for chunk_size in (1, 5):
        found = trained(kind, chunk_size, accumulation)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_parts_of_a_condition_are_cut_into_chunks_too(source):
    class Conditioned(DiffusionModule):
        def encode(self, batch):
            return Clean(batch, cond={"text": batch * 2})

        def predict(self, x, noised):
            return super().predict(x + noised.cond["text"], replace(noised, cond=None))

    x0, found = torch.randn(6, 2, generator=source), []
    for size in (None, 5):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = ResidualMLP(2, width=8, depth=1)
            nn.init.normal_(network.project_out.weight)
        model = Conditioned(network, draws=CARV(4, chunk_size=size))
        estimate = model.loss(x0, generator(1))
        found.append((estimate.loss, estimate.per_draw))
    assert_same(found[0], found[1], rtol=1e-5, atol=1e-6)
