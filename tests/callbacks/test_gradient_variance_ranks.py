"""GradientVariance in runs on two ranks, which Lightning or a launcher starts."""

import functools

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from support.ranks import launch
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import STF, VP, DiffusionModule, ResidualMLP
from lightning_vr.callbacks.gradient_variance import GradientVariance
from lightning_vr.core.rng import generator

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

POINTS = torch.randn(24, 3, generator=generator("points of ranks"))


class Plain(LightningModule):
    """A module that knows nothing of us: ``½ |net(x)|²``."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def loss(self, x):
        return 0.5 * self.net(x).square().sum(1)

    def training_step(self, batch, batch_idx):
        return self.loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain_loss(module, x0, noise, t):
    return module.loss(x0 + t[:, None] * noise)


def diffusion(target=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP(3, width=8, depth=1)
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    return DiffusionModule(network, target=target, optimizer=optimizer)


class Save(Callback):
    """Writes what each rank has seen and ends with to a file of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)

    def on_train_end(self, trainer, pl_module):
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        found = {
            "weights": nn.utils.parameters_to_vector(pl_module.parameters()).detach(),
            "random": torch.get_rng_state(),
            "batches": torch.stack(self.batches),
            "numbers": {k: v for k, v in metrics.items() if k.startswith("gradient_")},
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def fit(model, folder, *callbacks, strategy="ddp_fork", **options):
    torch.manual_seed(5)
    Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=2,
        max_epochs=2,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, Save(folder)],
        **options,
    ).fit(model, DataLoader(POINTS, batch_size=3))


def read(folder):
    """What both ranks have written."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def each(**settings):
    return GradientVariance(every_n_steps=1, samples=2, noise_levels=2, **settings)


RUNS = {
    "ranks": (Plain, {}, {}),
    "ranks-accumulated": (Plain, {}, {"accumulate_grad_batches": 2}),
    "given": (Plain, {"loss": plain_loss, "schedule": VP()}, {}),
    "per-sample": (diffusion, {}, {}),
    "gathered-references": (functools.partial(diffusion, STF("batch")), {}, {}),
}


@pytest.fixture(scope="module")
def runs(no_pictures_in_module, tmp_path_factory):
    """Runs with the callback and without it, all on the same two processes."""
    folders = {name: [tmp_path_factory.mktemp(name) for _ in range(2)] for name in RUNS}

    def train(_):
        for name, (make, settings, options) in RUNS.items():
            for folder, callbacks in zip(folders[name], ([each(**settings)], []), strict=True):
                strategy = DDPStrategy(start_method="popen")
                fit(make(), folder, *callbacks, strategy=strategy, **options)

    launch(train, 2)
    return {name: [read(folder) for folder in folders[name]] for name in RUNS}


@pytest.fixture(params=RUNS)
def run(request, runs):
    return request.param, *runs[request.param]


def test_weights_and_random_states_are_those_of_a_run_without_the_callback(run):
    _, with_callback, without = run
    for one, other in zip(with_callback, without, strict=True):
        for name in ("weights", "random", "batches"):
            assert torch.equal(one[name], other[name]), name
        assert not other["numbers"]


def test_both_ranks_know_the_same_numbers(run):
    _, (first, second), _ = run
    assert first["numbers"] == second["numbers"]
    assert first["numbers"]["gradient_variance/total"] > 0


def test_the_decomposition_is_told_where_noise_can_be_drawn_again(run):
    name, (first, _), _ = run
    numbers = first["numbers"]
    parts = [f"gradient_variance/{part}" for part in ("data", "timestep", "noise")]
    if name.startswith("ranks"):
        assert not set(parts) & set(numbers)
    else:
        total = sum(numbers[part] for part in parts)
        assert total == pytest.approx(numbers["gradient_variance/total"], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_a_loss_it_is_what_one_process_computes_from_all_ranks_gradients(
    tmp_path, accumulation
):
    fit(Plain(), tmp_path, each(), accumulate_grad_batches=accumulation)
    found = read(tmp_path)
    model, totals, squares = Plain(), [], []
    parameters = list(model.parameters())
    batches = torch.stack([one["batches"] for one in found])  # (ranks, batches, 3, 3)
    for start in range(0, batches.shape[1], accumulation):
        parts = batches[:, start : start + accumulation].flatten(0, 1)
        gradients = torch.stack(
            [
                nn.utils.parameters_to_vector(torch.autograd.grad(model.loss(x).mean(), parameters))
                for x in parts
            ]
        )
        total = 3 * gradients.double().var(dim=0).sum()
        totals.append(total)
        squares.append(gradients.mean(0).double().square().sum() - total / (3 * len(parts)))
        with torch.no_grad():
            flat = nn.utils.parameters_to_vector(parameters) - 0.1 * gradients.mean(0)
            nn.utils.vector_to_parameters(flat, parameters)

    weight = 0.99 ** torch.arange(len(totals) - 1, -1, -1, dtype=torch.float64)
    for name, values in (("total", totals), ("squared_mean", squares)):
        mean = float((weight * torch.stack(values)).sum() / weight.sum())
        assert found[0]["numbers"][f"gradient_variance/{name}"] == pytest.approx(mean, rel=1e-4)
    expected = nn.utils.parameters_to_vector(parameters)
    torch.testing.assert_close(found[1]["weights"], expected, rtol=1e-5, atol=1e-6)


def test_rank_0_alone_writes_the_file_and_the_table(tmp_path, capfd):
    fit(Plain(), tmp_path, each())
    assert (tmp_path / "gradient_variance.csv").exists()
    assert (tmp_path / "gradient_variance.png").exists()
    assert capfd.readouterr().out.count("Noise scale") == 1
