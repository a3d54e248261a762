"""Measure and reduce the gradient noise of a masked diffusion language model of sums.

    python examples/masked_language/masked_language.py

The model fills in masked characters of strings such as "12+7=019". Its Lightning module knows
nothing of diffusion schedules: ``GradientVariance`` measures what its noise consists of (data, mask
rate, mask pattern), ``TimestepSampler`` draws its mask rates. At equal numbers of strings through
the network, the script compares the variance of the batch's gradient, and held-out loss against
steps.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from lightning_vr import GradientVariance, LearnedProposal, TimestepSampler, Uniform
from lightning_vr.callbacks.gradient_variance_report import draw_components
from lightning_vr.core.rng import generator

ALPHABET = "0123456789+="
MASK, LENGTH, ANSWER = len(ALPHABET), 8, slice(5, 8)
RATES = Uniform(0.02, 1.0)
BATCH = 64
COMPONENTS = ("data", "mask rate", "mask pattern")


class Way(NamedTuple):
    """How the 64 masked strings of a step are drawn."""

    settings: dict[str, Any]
    learns: bool = False
    copies: int = 1

    def sampler(self) -> TimestepSampler:
        return TimestepSampler(RATES, LearnedProposal() if self.learns else None, **self.settings)


WAYS = {
    "plain": Way({"strata": False}),
    "strata": Way({"strata": True}),
    "learned proposal": Way({"strata": False}, learns=True),
    "strata and proposal": Way({"strata": True}, learns=True),
    "two masks of each string": Way({"strata": False}, copies=2),
    "complementary pairs": Way({"strata": False, "antithetic": True}, copies=2),
    "all": Way({"strata": True, "antithetic": True}, learns=True, copies=2),
}


def sums() -> tuple[Tensor, Tensor]:
    """Return the characters of 800 sums to train on and of 200 held out, ``(n, 8)``."""
    strings = [f"{a:02d}+{b}={a + b:03d}" for a in range(100) for b in range(10)]
    characters = torch.tensor([[ALPHABET.index(c) for c in text] for text in strings])
    order = torch.randperm(len(strings), generator=generator(0, "sums"))
    return characters[order[200:]], characters[order[:200]]


def draw_mask(x0: Tensor, t: Tensor, source: torch.Generator) -> Tensor:
    return torch.rand(x0.shape, generator=source, device=x0.device) < t[:, None]


def weighted_errors(logits: Tensor, x0: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    """Return the bound on -log p(x0) of each string, in nats for each character ``(n,)``."""
    errors = F.cross_entropy(logits.mT, x0, reduction="none")
    return (errors * mask).sum(1) / (t * LENGTH)


def masked_loss(module: "MaskedModel", x0: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    return weighted_errors(module(torch.where(mask, MASK, x0)), x0, mask, t)


class MaskedModel(LightningModule):
    """A transformer that predicts masked characters, trained with rates from a sampler."""

    def __init__(self, way: Way, width: int, rate: float = 2e-3) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET) + 1, width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), False)
        self.head = nn.Linear(width, len(ALPHABET))
        self.way, self.times, self.rate = way, way.sampler(), rate

    def forward(self, characters: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(self.characters(characters) + self.places))
        return found

    def loss(self, x0: Tensor, source: torch.Generator) -> Tensor:
        """Return the loss of strings, each used as often as the way says; the sampler learns."""
        x0 = x0.repeat_interleave(self.way.copies, dim=0)
        t, weight, _ = self.times.draw(len(x0), source)
        mask = self.times.uniforms(x0.shape, source) < t[:, None]
        logits = self(torch.where(mask, MASK, x0))
        # the gradient by the logits stands for that by the parameters
        gap = logits.detach().softmax(-1) - F.one_hot(x0, len(ALPHABET))
        self.times.observe(t, (gap.square().sum(-1) * mask).sum(1) / (t * LENGTH) ** 2)
        return (weight * weighted_errors(logits, x0, mask, t)).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch, generator(torch.initial_seed(), "masks", self.global_step))

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.advance()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


class HeldOut:
    """Held-out loss with the same masks each time: one of each number of masked characters.

    For k uniform among 1 .. L and a mask of k characters, L / k times their summed error has the
    mean of the loss over rates: the variance of the weight 1 / t is gone.
    """

    def __init__(self, strings: Tensor) -> None:
        order = torch.rand(len(strings), LENGTH, LENGTH, generator=generator(0, "held out"))
        counts = torch.arange(1, LENGTH + 1)
        mask = order.argsort(-1) < counts[:, None]  # row k - 1 masks k characters
        self.strings, self.mask = strings, mask.flatten(0, 1)
        self.x0 = strings.repeat_interleave(LENGTH, dim=0)
        self.rates = (counts / LENGTH).repeat(len(strings))

    @torch.no_grad()
    def __call__(self, model: MaskedModel) -> tuple[float, float]:
        """Return the loss, and the fraction of sums whose three digits are all right."""
        model.eval()
        loss = float(masked_loss(model, self.x0, self.mask, self.rates).mean())
        asked = self.strings.clone()
        asked[:, ANSWER] = MASK
        answer = model(asked)[:, ANSWER].argmax(-1)
        model.train()
        return loss, float((answer == self.strings[:, ANSWER]).all(1).float().mean())


class Record(Callback):
    """Keeps held-out loss and accuracy while a model trains."""

    def __init__(self, held_out: HeldOut, every: int) -> None:
        self.held_out, self.every = held_out, every
        self.rows: list[tuple[int, float, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.rows.append((trainer.global_step, *self.held_out(pl_module)))


def train(
    name: str, seed: int, steps: int, width: int, strings: Tensor, *callbacks: Callback, logger: Any
) -> MaskedModel:
    """Train a model with one of the ways."""
    seed_everything(seed, verbose=False)
    model = MaskedModel(WAYS[name], width)
    sampler = RandomSampler(strings, replacement=True, num_samples=steps * BATCH)
    loader = DataLoader(strings, BATCH // WAYS[name].copies, sampler=sampler)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=logger,
        log_every_n_steps=min(50, steps),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    return model


def variance(model: MaskedModel, name: str, strings: Tensor, batches: int) -> tuple[float, float]:
    """Return the variance of a batch's gradient times the batch size, and its standard error."""
    way, parameters = WAYS[name], list(model.parameters())
    model.way, model.times = way, way.sampler()
    found = []
    for i in range(-(batches // 4) * way.learns, batches):  # batches before 0 teach the proposal
        source = generator(0, name, i)
        index = torch.randint(len(strings), (BATCH // way.copies,), generator=source)
        loss = model.loss(strings[index], source)
        model.times.advance()
        if i >= 0:
            gradient = torch.autograd.grad(loss, parameters)
            found.append(torch.cat([part.flatten() for part in gradient]))
    gradients = torch.stack(found)
    squares = (gradients - gradients.mean(0)).square().sum(1).double() * batches / (batches - 1)
    return BATCH * float(squares.mean()), BATCH * float(squares.std()) / batches**0.5


def measure(options: argparse.Namespace, strings: Tensor, steps: int) -> dict[str, Any]:
    """Return components by mask rate, and the variance of each way, after some steps of plain."""
    components = GradientVariance(
        every_n_steps=max(1, steps // 50),
        samples=min(32, 4 * options.batches),
        loss=masked_loss,
        draw=draw_mask,
        timesteps=RATES,
        components=COMPONENTS,
    )
    logger = CSVLogger(options.folder, name=f"plain_{steps}", version="")
    model = train("plain", 0, steps, options.width, strings, components, logger=logger)
    found = {name: variance(model, name, strings, options.batches) for name in WAYS}
    plain, error = found["plain"]
    print(f"after {steps} steps: variance of the batch's gradient, over that of plain")
    for name, (value, own) in found.items():
        ratio = value / plain
        spread = ratio * ((own / value) ** 2 + (error / plain) ** 2) ** 0.5
        print(f"  {name:25} {ratio:.2f} ± {0.0 if name == 'plain' else spread:.2f}")
    return {"variances": found, "statistics": components.statistics}


def compare(options: argparse.Namespace, strings: Tensor, held_out: HeldOut) -> dict[str, Tensor]:
    """Return held-out loss and accuracy of each way ``(seeds, evaluations, 3)``."""
    found = {}
    for name in options.ways:
        runs = []
        for seed in range(1, options.seeds + 1):
            record = Record(held_out, max(1, options.steps // 10))
            train(name, seed, options.steps, options.width, strings, record, logger=False)
            runs.append(record.rows)
        found[name] = torch.tensor(runs)
    print(f"held out after {options.steps} steps, {options.seeds} seeds")
    baseline = found[options.ways[0]]
    for name, runs in found.items():
        loss, accuracy = runs[:, -1, 1], runs[:, -1, 2]
        gap = runs[:, len(runs[0]) // 2 :, 1].mean(1) - baseline[:, len(runs[0]) // 2 :, 1].mean(1)
        print(
            f"  {name:25} loss {_mean(loss)}, sums right {_mean(100 * accuracy, 1)} %, "
            f"loss over the second half less plain {_mean(gap)}"
        )
    return found


def _mean(values: Tensor, digits: int = 4) -> str:
    error = float(values.std()) / len(values) ** 0.5
    return f"{float(values.mean()):.{digits}f} ± {error:.{digits}f}"


def draw(path: Path, early: dict[str, Any], late: dict[str, Any], runs: dict[str, Tensor]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    parts, ratios, losses = figure.subplots(1, 3)
    statistics = late["statistics"]
    names = [f"{float(t):.2f}" for t in statistics.noise_levels]
    draw_components(parts, statistics.levels, names, statistics.levels_error, COMPONENTS)
    parts.set(title="variance of one string's gradient", xlabel="mask rate t")
    for offset, found, label in ((-0.2, early, "early"), (0.2, late, "late")):
        values = torch.tensor([found["variances"][name] for name in WAYS])
        at = torch.arange(len(WAYS)) + offset
        value, error = (values / values[0, 0]).numpy().T
        ratios.barh(at.numpy(), value, 0.4, xerr=error, label=label)
    ratios.set_yticks(range(len(WAYS)), list(WAYS))
    ratios.set(title="variance of the batch's gradient, over plain")
    ratios.invert_yaxis()
    ratios.legend()
    for name, each in runs.items():
        steps, loss = each[0, :, 0].numpy(), each[..., 1].numpy()
        error = loss.std(0, ddof=1) / len(loss) ** 0.5
        losses.errorbar(steps, loss.mean(0), error, label=name, capsize=2)
    losses.set(title="held-out loss, nats a character", xlabel="steps", yscale="log")
    losses.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each run")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3, help="two or more")
    parser.add_argument("--batches", type=int, default=300, help="gradients for each variance")
    parser.add_argument("--ways", nargs="+", default=["plain", "strata and proposal", "all"])
    parser.add_argument("--folder", type=Path, default=Path("runs/masked_language"))
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see it run")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.width, options.seeds, options.batches = 8, 8, 2, 4
    strings, held_out = sums()
    held_out = held_out[: 10 * options.batches]
    early = measure(options, strings, max(1, options.steps // 10))
    late = measure(options, strings, options.steps)
    runs = compare(options, strings, HeldOut(held_out))
    draw(options.folder / "masked_language.png", early, late, runs)


if __name__ == "__main__":
    main()
