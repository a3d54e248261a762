"""Find how many times to noise each latent: an autoencoder upstream of a small denoiser.

Digits are enlarged and encoded on the fly by diffusers' ``AutoencoderKL``, which is trained first
and then frozen, before a ``UNet2DModel`` learns to denoise their latents. Encoding takes longer
than training on one draw of time and noise, so ``CARV`` noises each latent K times. For each K, at
fixed trained weights, this measures the variance of the gradient of a step and the seconds of a
step. Their product is proportional to the compute that a given variance costs. It is compared with
the prediction of a pilot at K = 4, and with the K that ``CARV("auto")`` takes.

    python examples/expensive_encode/latent_resampling.py

The results are in ``runs/latent_resampling``, after a quarter of an hour on one thread. The cost of
encoding depends on ``--image_size`` and ``--vae_width``; the cheaper settings of the README are

    --image_size 32 --batches 48 --steps 500 --seeds 3 --folder runs/latents_32
    --image_size 16 --vae_width 16 --batches 48 --steps 500 --seeds 3 --folder runs/latents_16

A run that was stopped continues where it was.
"""

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import interpolate, mse_loss
from torch.utils.data import DataLoader

from lightning_vr import CARV, DiffusionModule
from lightning_vr.core.types import Clean
from lightning_vr.data import Digits
from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.accounting import (
    CostModel,
    effective_compute_multiplier,
    fixed_and_marginal,
)
from lightning_vr.variance.gradient_measurement import GradientMeasurement
from lightning_vr.variance.intervals import Interval, jackknife

LATENT_SIDE = 8
LATENT_SPREAD = 0.5
"""Standard deviation of scaled latents: the ``sigma_data`` that is the default."""

PILOT = 4
"""K of the pilot from which the predictions are made."""

KINDS = {"independent": "independent draws", "stratified": "strata and learned proposal"}


class LatentDiffusion(DiffusionModule):
    """Diffusion of an autoencoder's latents, encoded on the fly.

    Args:
        autoencoder: Folder or name of a pretrained ``AutoencoderKL``.
        image_size: Side that images are enlarged to.
        **settings: Of ``DiffusionModule``.
    """

    def __init__(self, autoencoder: str, image_size: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.image_size = image_size
        # without gradients it is not in the optimizer; Lightning leaves it in evaluation mode
        self.vae = AutoencoderKL.from_pretrained(autoencoder).requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor]) -> Clean:
        images = enlarged(batch["image"], self.image_size, self.vae.config.in_channels)
        latents = self.vae.encode(images).latent_dist.sample()
        return Clean(latents * self.vae.config.scaling_factor, batch["label"])

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        return self.vae.decode(x0 / self.vae.config.scaling_factor).sample


def enlarged(images: Tensor, size: int, channels: int) -> Tensor:
    images = interpolate(images, size=size, mode="bicubic", align_corners=False)
    return images.expand(-1, channels, -1, -1)


def train_autoencoder(options: argparse.Namespace, data: Digits, folder: Path) -> None:
    """Train a small autoencoder by reconstruction and a little KL, and save it."""
    blocks = 1 + round(math.log2(options.image_size / LATENT_SIDE))
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=[options.vae_width] * (blocks - 1) + [2 * options.vae_width],
        latent_channels=4,
        norm_num_groups=4,
        sample_size=options.image_size,
    )
    steps = options.vae_steps
    loader = DataLoader(data.train_dataset, batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    batches = (batch for _ in range(steps) for batch in loader)
    for step, batch in zip(range(steps), batches, strict=False):
        images = enlarged(batch["image"], options.image_size, 1)
        posterior = vae.encode(images).latent_dist
        error = mse_loss(vae.decode(posterior.sample()).sample, images)
        loss = error + 1e-5 * posterior.kl().mean() / LATENT_SIDE**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"autoencoder, step {step}: squared error {float(error.detach()):.4f}", flush=True
            )

    with torch.no_grad():
        images = enlarged(next(iter(data.train_dataloader()))["image"], options.image_size, 1)
        spread = vae.encode(images).latent_dist.sample().std()
    vae.register_to_config(scaling_factor=LATENT_SPREAD / float(spread))
    vae.save_pretrained(folder)


def build(options: argparse.Namespace, draws: CARV, weights: Path | None = None) -> LatentDiffusion:
    channels = AutoencoderKL.load_config(options.autoencoder)["latent_channels"]
    module = LatentDiffusion(
        options.autoencoder,
        options.image_size,
        network=UNet2DModel(
            sample_size=LATENT_SIDE,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=options.widths,
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=["DownBlock2D"] * len(options.widths),
            up_block_types=["UpBlock2D"] * len(options.widths),
            add_attention=False,
        ),
        draws=draws,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        lr_scheduler=partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=2e-3, total_steps=options.steps + 2
        ),
    )
    module.seed = 0
    if weights is not None:
        module.network.load_state_dict(torch.load(weights)["network"])
    return module


def fit(module: LatentDiffusion, data: Digits, steps: int) -> None:
    # the autoencoder stays in evaluation mode on purpose
    warnings.filterwarnings("ignore", "Found .* in eval mode at the start of training")
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(module, datamodule=data)


def train_denoiser(options: argparse.Namespace, data: Digits, weights: Path) -> None:
    module = build(options, CARV(8, LearnedProposal()))
    fit(module, data, options.steps)
    print(f"denoiser, step {options.steps}: loss {float(module.estimate.loss):.4f}", flush=True)
    state = {
        "network": module.network.state_dict(),
        "proposal": module.draws.proposal.state_dict(),
    }
    torch.save(state, weights)


def estimator(kind: str, resamples: int | str, weights: Path) -> CARV:
    """Return draws of a kind, with the learned proposal where the kind has one."""
    if kind == "independent":
        return CARV(resamples, scope="none")
    proposal = LearnedProposal()
    proposal.load_state_dict(torch.load(weights)["proposal"])
    return CARV(resamples, proposal)


def encoded_batches(module: LatentDiffusion, data: Digits, count: int) -> list[Clean]:
    """Encode batches; those of an epoch are disjoint, as those of an endless data set would be."""
    torch.manual_seed(1)  # the same batches when a run continues
    found: list[Clean] = []
    while len(found) < count:
        found += [module.clean(batch) for batch in data.train_dataloader()]
    return found[:count]


def components(
    options: argparse.Namespace, module: LatentDiffusion, batches: list[Clean], key: str
) -> list[list[float]]:
    """Return the components of a step's variance for one sample: ``data, timestep, noise, total``.

    Each estimate rests on a few batches of its own, so that estimates can be resampled.
    """
    size = options.batches_per_estimate
    groups = [0 for p in module.parameters() if p.requires_grad]
    measurement = GradientMeasurement(DiffusionLoss(module), module.generator, groups)
    parts = [batches[i : i + size] for i in range(0, len(batches), size)]
    found = [measurement.by_differences(part, key, i) for i, part in enumerate(parts)]
    return [[float(component[0]) for component in each[:4]] for each in found]


class StepTimer:
    """Times whole steps in turn, so that other work on the machine slows all of them alike."""

    def __init__(self, module: LatentDiffusion, data: Digits) -> None:
        self.module = copy.deepcopy(module)
        self.batch = next(iter(data.train_dataloader()))
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def measure(
        self, steps: dict[str, tuple[int, CARV]], rounds: int
    ) -> dict[str, list[list[float]]]:
        """Return seconds to encode and of the rest, for each of ``steps`` (samples and draws)."""
        found: dict[str, list[list[float]]] = {name: [] for name in steps}
        for i in range(rounds + 1):
            for name, (samples, draws) in steps.items():
                seconds = self._step(samples, draws)
                if i > 0:  # the first round warms up
                    found[name].append(seconds)
        return found

    def _step(self, samples: int, draws: CARV) -> list[float]:
        module, source = self.module, self.module.generator("timing")
        module.draws = draws
        batch = {name: rows[:samples] for name, rows in self.batch.items()}
        start = time.perf_counter()
        clean = module.clean(batch)
        encoded = time.perf_counter()
        times = draws.times(clean, module.objective, source)
        module.compute_loss(*module.draw(clean, source, times)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [encoded - start, time.perf_counter() - encoded]


class Results(dict):
    """Measurements so far, stored on disk after each of them."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.path = path

    def store(self, key: str, value: Any) -> None:
        self[key] = value
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self, indent=1))
        part.replace(self.path)


def measure(options: argparse.Namespace, data: Digits, weights: Path, results: Results) -> None:
    """Measure what is missing: the pilot, the K of auto, variances and seconds for each K."""
    module = build(options, CARV(1), weights)

    @cache
    def batches() -> list[Clean]:
        return encoded_batches(module, data, 2 * options.batches)

    if "pilot" not in results:
        module.draws = estimator("independent", PILOT, weights)
        results.store("pilot", components(options, module, batches()[options.batches :], "pilot"))
    arms = {f"{kind} {k}": estimator(kind, k, weights) for kind in KINDS for k in options.resamples}
    for kind in KINDS:
        chosen = results.get(f"auto {kind}") or []
        for seed in range(len(chosen), options.seeds):
            chosen.append(automatic(options, data, kind, weights, seed))
            results.store(f"auto {kind}", chosen)
        middle = statistics.median_low(each["resamples"] for each in chosen)
        arms.setdefault(f"{kind} {middle}", estimator(kind, middle, weights))

    for name, draws in arms.items():
        if f"variance {name}" not in results:
            module.draws = draws
            found = components(options, module, batches()[: options.batches], "sweep")
            results.store(f"variance {name}", found)
            total = statistics.fmean(each[3] for each in results[f"variance {name}"])
            print(f"{name}: variance {total:.4g}", flush=True)
    steps = {name: (options.samples, draws) for name, draws in arms.items()}
    # the pilot's steps run in the same rounds; the largest K of the sweep are predicted from them
    for samples, k in pilot_shapes(options.samples):
        steps[f"pilot {samples} {k}"] = (samples, estimator("independent", k, weights))
    if set(results.get("seconds", {})) != set(steps):
        results.store("seconds", StepTimer(module, data).measure(steps, options.rounds))


def pilot_shapes(samples: int) -> list[tuple[int, int]]:
    """Return R and K of the steps that the model of their seconds follows from."""
    return [(samples // 4, 1), (samples, 1), (samples, 4)]


def automatic(
    options: argparse.Namespace, data: Digits, kind: str, weights: Path, seed: int
) -> dict[str, Any]:
    """Return the result of the first pilot of ``CARV("auto")`` when training continues."""
    module = build(options, estimator(kind, "auto", weights), weights)
    module.seed = seed
    fit(module, data, 2)
    draws = module.draws
    print(f"auto, {KINDS[kind]}: K = {draws.draws_per_sample}, {draws.pilot}", flush=True)
    return {"resamples": draws.draws_per_sample, "pilot": draws.pilot}


def summarise(options: argparse.Namespace, results: Results) -> dict[str, Any]:
    """Return predictions and realised values from the measurements."""
    pilot = torch.tensor(results["pilot"], dtype=torch.float64)
    between = jackknife(lambda mean: mean, pilot[:, 0])
    within = jackknife(lambda mean: PILOT * mean, pilot[:, 1] + pilot[:, 2])
    cost = cost_model(results["seconds"], options.samples)
    shared = cost.upstream + cost.fixed / options.samples
    squared_optimum = max(0.0, within.estimate / between.estimate) / cost.denoise

    rows = []
    automatic = {}
    for kind in KINDS:
        chosen = [each["resamples"] for each in results[f"auto {kind}"]]
        middle = statistics.median_low(chosen)
        found = [
            compare(results, kind, k, options.samples, between.estimate, within.estimate, cost)
            for k in sorted({*options.resamples, middle})
        ]
        for row in found:
            row["auto"] = row["resamples"] == middle
        rows += found
        products = [1 / row["multiplier"].estimate for row in found]
        own = next(p for p, row in zip(products, found, strict=True) if row["auto"])
        automatic[kind] = {"resamples": chosen, "over_least": own / min(products)}
    return {
        "cost": asdict(cost) | {"ratio": cost.upstream / cost.denoise},
        "between": between,
        "within": within,
        "optimum": math.sqrt(squared_optimum * cost.upstream),
        "optimum_with_fixed": math.sqrt(squared_optimum * shared),
        "rows": rows,
        "auto": automatic,
    }


def compare(
    results: Results,
    kind: str,
    resamples: int,
    samples: int,
    between: float,
    within: float,
    cost: CostModel,
) -> dict[str, Any]:
    """Return the measurements at one K and the predictions of the pilot."""

    def predicted(k: int) -> float:
        return (between + within / k) * cost.seconds(samples, k) / samples

    total, base = (
        torch.tensor(results[f"variance {name}"], dtype=torch.float64)[:, 3]
        for name in (f"{kind} {resamples}", "independent 1")
    )
    seconds, theirs = (
        torch.tensor(results["seconds"][name]) for name in (f"{kind} {resamples}", "independent 1")
    )
    variance = jackknife(lambda mean: mean, total)
    step = float(seconds.sum(dim=1).median())
    return {
        "kind": kind,
        "resamples": resamples,
        "variance": variance,
        "predicted_variance": between + within / resamples,
        "seconds": step,
        "encode_seconds": float(seconds[:, 0].median()),
        "predicted_seconds": cost.seconds(samples, resamples),
        "product": variance.estimate * step / samples,
        "predicted_product": predicted(resamples),
        "multiplier": effective_compute_multiplier(
            base, total, theirs.sum(dim=1), seconds.sum(dim=1)
        ),
        "predicted_multiplier": predicted(1) / predicted(resamples),
    }


def cost_model(found: dict[str, list[list[float]]], samples: int) -> CostModel:
    """Return a model of the seconds of a step from those of encoding and of two other passes."""
    seconds = {
        shape: torch.tensor(found["pilot {} {}".format(*shape)]).median(dim=0).values.tolist()
        for shape in pilot_shapes(samples)
    }
    (few, _), (many, k) = pilot_shapes(samples)[0], pilot_shapes(samples)[-1]
    fixed, denoise = fixed_and_marginal(few, many * k, seconds[few, 1][1], seconds[many, k][1])
    return CostModel(fixed, seconds[samples, 1][0] / samples, denoise)


def report(summary: dict[str, Any], samples: int) -> str:
    """Return the tables in plain text."""
    cost = summary["cost"]
    lines = [
        f"a step of R = {samples} samples takes {1e3 * cost['fixed']:.3g} ms, and for each sample "
        f"{1e3 * cost['upstream']:.3g} ms + K {1e3 * cost['denoise']:.3g} ms: "
        f"encoding costs {cost['ratio']:.2g} draws",
        f"V_B = {interval(summary['between'])}, V_W = {interval(summary['within'])}; "
        f"K* = {summary['optimum']:.2g}, with the fixed time shared by R samples "
        f"{summary['optimum_with_fixed']:.2g}",
        "",
        f"{'draws':26} {'K':>3} {'variance of a sample':>24} {'predicted':>9} {'ms':>6} "
        f"{'predicted':>9} {'variance x s':>12} {'predicted':>9} {'ECM':>20} {'predicted':>9}",
    ]
    for row in summary["rows"]:
        independent = row["kind"] == "independent"
        forecast = [row["predicted_variance"], row["predicted_product"]]
        variance, product = (f"{x:9.3g}" if independent else " " * 9 for x in forecast)
        multiplier = f"{row['predicted_multiplier']:9.2f}" if independent else ""
        lines.append(
            f"{KINDS[row['kind']]:26} {row['resamples']:3} {interval(row['variance']):>24} "
            f"{variance} {1e3 * row['seconds']:6.1f} {1e3 * row['predicted_seconds']:9.1f} "
            f"{row['product']:12.3g} {product} {interval(row['multiplier']):>20} {multiplier}"
            f"{'  <- auto' if row['auto'] else ''}"
        )
    lines.append("")
    for what in ("variance", "seconds", "product", "multiplier"):
        ratios = [
            first(row[f"predicted_{what}"]) / first(row[what])
            for row in summary["rows"]
            if row["kind"] == "independent"
        ]
        lines.append(f"predicted over realised {what}: {min(ratios):.2f} to {max(ratios):.2f}")
    for kind, found in summary["auto"].items():
        lines.append(
            f"auto, {KINDS[kind]}: K = {', '.join(map(str, found['resamples']))} over seeds; "
            f"variance x seconds of the middle one over the least: {found['over_least']:.2f}"
        )
    return "\n".join(lines)


def first(value: Any) -> float:
    return value if isinstance(value, float) else value[0]


def interval(found: Interval) -> str:
    return f"{found[0]:.3g} ({found[1]:.3g} to {found[2]:.3g})"


def draw(summary: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = summary["rows"]
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    line = [row for row in rows if row["kind"] == "independent"]
    left.plot(
        [row["resamples"] for row in line],
        [1 / row["predicted_multiplier"] for row in line],
        color="0.4",
        label=f"predicted by a pilot at K = {PILOT}",
    )
    for (kind, label), color in zip(KINDS.items(), ("C0", "C1"), strict=True):
        own = [row for row in rows if row["kind"] == kind]
        gains = torch.tensor([row["multiplier"] for row in own]).double()
        middle, low, high = (1 / gains).T
        left.errorbar(
            [row["resamples"] for row in own],
            middle,
            [middle - high, low - middle],
            fmt="o",
            color=color,
            capsize=3,
            markersize=4,
            label=label,
        )
        at_auto = [(row["resamples"], 1 / row["multiplier"][0]) for row in own if row["auto"]]
        left.plot(*zip(*at_auto, strict=True), "*", color=color, markersize=15, fillstyle="none")
    left.plot([], [], "k*", markersize=12, fillstyle="none", label='K of CARV("auto")')
    left.set_xscale("log", base=2)
    left.set_ylim(bottom=0)
    left.set_title(f"encoding costs {summary['cost']['ratio']:.2g} draws")
    left.set_ylabel("variance × seconds, over that of K = 1")
    left.legend(fontsize=8)

    numbers = range(len(line))
    encode = [1e3 * row["encode_seconds"] for row in line]
    rest = [1e3 * (row["seconds"] - row["encode_seconds"]) for row in line]
    right.bar(numbers, encode, color="0.75", label="encode")
    right.bar(numbers, rest, bottom=encode, color="C0", alpha=0.6, label="denoiser and optimizer")
    right.plot(
        numbers, [1e3 * row["predicted_seconds"] for row in line], "k_", markersize=22,
        label="predicted",
    )  # fmt: skip
    right.set_xticks(numbers, [str(row["resamples"]) for row in line])
    right.set_title("where the time of a step goes")
    right.set_ylabel("milliseconds")
    right.legend(fontsize=8)
    powers = [k for k in (row["resamples"] for row in line) if k & (k - 1) == 0]
    left.set_xticks(powers, [str(k) for k in powers])
    left.minorticks_off()
    for axes in (left, right):
        axes.set_xlabel("K, draws of each latent")
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_size", type=int, default=64, choices=(16, 32, 64, 128))
    parser.add_argument("--vae_width", type=int, default=32)
    parser.add_argument("--autoencoder", help="a pretrained one (default: train one)")
    parser.add_argument("--samples", type=int, default=32, help="R, samples of a step")
    parser.add_argument("--vae_steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=800, help="of training the denoiser")
    parser.add_argument("--batches", type=int, default=96, help="for each variance")
    parser.add_argument("--rounds", type=int, default=40, help="of timing")
    parser.add_argument("--seeds", type=int, default=5, help="for the K of auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/latent_resampling"))
    parser.add_argument("--quick", action="store_true", help="run for a few seconds, as a test")
    options = parser.parse_args()
    options.resamples, options.widths = [1, 2, 4, 8, 16], [16, 32]
    options.batches_per_estimate = 4
    if options.quick:
        quick = {"image_size": 16, "vae_width": 4, "samples": 8, "vae_steps": 3, "steps": 3}
        quick |= {"batches": 6, "batches_per_estimate": 2}
        quick |= {"rounds": 2, "seeds": 1, "resamples": [1, 4], "widths": [8]}
        vars(options).update(quick)
    return options


def main() -> None:
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = Results(options.folder / "results.json")
    settings = {name: str(value) for name, value in vars(options).items() if name != "folder"}
    if results.setdefault("settings", settings) != settings:
        raise SystemExit(f"{options.folder} has results of other settings: use another `--folder`.")

    seed_everything(0, verbose=False)
    data = Digits(batch_size=options.samples)
    data.setup()
    weights = options.folder / "denoiser.pt"
    if options.autoencoder is None:
        options.autoencoder = str(options.folder / "autoencoder")
        if not Path(options.autoencoder).exists():
            train_autoencoder(options, data, Path(options.autoencoder))
    if not weights.exists():
        train_denoiser(options, data, weights)
    measure(options, data, weights, results)
    results.store("summary", summarise(options, results))
    table = report(results["summary"], options.samples)
    (options.folder / "table.txt").write_text(table + "\n")
    print(table)
    draw(results["summary"], options.folder / "latent_resampling.png")


if __name__ == "__main__":
    main()
