"""CARV under ``Trainer(strategy="ddp_fork", devices=2, accumulate_grad_batches=2)``."""

import functools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightning_vr.core.rng import generator
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.schedules import VE
from lightning_vr.process.timesteps import Uniform
from lightning_vr.training.module import DiffusionModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

POINTS = torch.randn(48, 2, generator=generator("points of ranks"))
SAMPLES, RANKS, BATCHES = 3, 2, 2
STEPS = len(POINTS) // (SAMPLES * RANKS * BATCHES)


def learned(**options):
    return CARV(4, LearnedProposal(bins=3, memory=0.5), "nested", **options)


DRAWS = {
    "global": lambda: CARV(1, scope="global"),
    "nested": lambda: CARV(2, scope="nested"),
    "learned": learned,
    "chunks": lambda: learned(chunk_size=5),
}


class Save(Callback):
    """Writes what each rank drew and learned to a file of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.seen = {"t": [], "loss": [], "weight": [], "table": []}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        estimate = module.estimate
        self.seen["t"].append(estimate.noised.t)
        self.seen["loss"].append(estimate.per_draw)
        self.seen["weight"].append(estimate.noised.weight)
        if module.draws.proposal is not None:
            self.seen["table"].append(module.draws.proposal.table.clone())

    def on_train_end(self, trainer, module):
        found = {name: torch.stack(values) for name, values in self.seen.items() if values}
        found["weights"] = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def module(draws):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP(2, width=8, depth=1)
        torch.nn.init.normal_(network.project_out.weight)
    return DiffusionModule(
        network,
        schedule=VE(),
        timesteps=Uniform(0, 1),
        draws=draws,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.002),
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """What both ranks have seen and learned with draws."""

    @functools.cache
    def fit(name):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(5)
        Trainer(
            accelerator="cpu",
            strategy="ddp_fork",
            devices=RANKS,
            accumulate_grad_batches=BATCHES,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Save(folder)],
        ).fit(module(DRAWS[name]()), DataLoader(POINTS, batch_size=SAMPLES))
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]

    return fit


def both(found, name):
    """What both ranks have seen in each step, ``(STEPS, RANKS, BATCHES, *)``."""
    values = torch.stack([one[name] for one in found])
    return values.unflatten(1, (STEPS, BATCHES)).transpose(0, 1)


def hits(u, strata):
    return torch.nn.functional.one_hot((u.double() * strata).long(), strata).sum(-2)


@pytest.mark.parametrize("name", ["global", "nested"])
def test_over_ranks_and_batches_of_a_step_every_stratum_is_hit_once(name, fitted):
    found = fitted(name)
    t = both(found, "t")
    assert (hits(t.flatten(1), t[0].numel()) == 1).all()
    if name == "nested":
        assert (hits(t.unflatten(-1, (SAMPLES, 2)), 2) == 1).all()


@pytest.mark.parametrize("name", ["global", "nested"])
def test_ranks_batches_and_steps_differ_in_order_and_jitter(name, fitted):
    found = fitted(name)
    t = both(found, "t")
    jitter = (t.double() * t[0].numel()).frac()
    assert len(jitter.float().unique()) == jitter.numel()
    order = (t.double() * t[0].numel()).long().flatten(1)
    assert len({tuple(row.tolist()) for row in order}) == STEPS


@pytest.mark.parametrize("name", ["learned", "chunks"])
def test_both_ranks_learn_the_same_from_the_draws_of_all(name, fitted):
    first, second = fitted(name)
    assert torch.equal(first["table"], second["table"])
    assert torch.equal(first["weights"], second["weights"])

    t, loss, weight = (both((first, second), name) for name in ("t", "loss", "weight"))
    table = torch.zeros(3, 3, dtype=torch.float64)
    for step in range(STEPS):
        # the weight on the network's error is one: its gradient's second moment is the loss
        moment = (loss[step] / weight[step]).flatten().double()
        bins = (t[step].flatten().double() * 3).long()
        counts = torch.bincount(bins, minlength=3).double()
        sums = torch.zeros(3, dtype=torch.float64).index_add(0, bins, moment)
        table[:2] = 0.5 * table[:2] + torch.stack([sums, counts])
        table[2] += counts
        after = first["table"][BATCHES * step + 1]
        torch.testing.assert_close(after, table, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["learned", "chunks"])
def test_each_step_draws_from_the_table_before_it(name, fitted):
    found = fitted(name)
    t, weight = both(found, "t"), both(found, "weight")
    assert torch.equal(weight[0], torch.ones_like(weight[0]))
    for step in range(1, STEPS):
        sums, counts, seen = found[0]["table"][BATCHES * step - 1]
        assert (seen >= 8).all()
        size = (sums / counts).sqrt()
        height = 0.9 * size / size.mean() + 0.1
        bins = (t[step].double() * 3).long()
        torch.testing.assert_close(weight[step], (1 / height[bins]).float())
        # strata are of q
        start = torch.cat([torch.zeros(1), height.cumsum(0)[:-1] / 3])
        u = (start[bins] + height[bins] * (t[step].double() - bins / 3)).clamp(0, 1 - 1e-9)
        assert (hits(u.flatten()[None], u.numel()) == 1).all()


def test_draws_in_chunks_train_as_whole_batches_do(fitted):
    for whole, parts in zip(fitted("learned"), fitted("chunks"), strict=True):
        for name in ("t", "loss", "table", "weights"):
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)
