"""Compare a learned with a fixed variance of the reverse process, on the digits.

    python examples/learned_variance/learned_variance.py

It trains one network that predicts epsilon and a variance, on a cosine schedule of 1000 timesteps,
and computes from its averaged weights the variational bound on held-out digits and the Fréchet
distance of samples, with the learned and with both fixed variances, for few and many steps.
"""

import argparse
import copy
import time
from collections.abc import Iterator

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from lightning_vr import DDPM, Diffusion, LearnedVariance, Sampler, VariationalBound
from lightning_vr.core.rng import generator
from lightning_vr.data import Digits
from lightning_vr.metrics import DigitFeatures
from lightning_vr.metrics.frechet_metric import frechet_distance

VARIANCES = ("learned", "beta", "beta_tilde")
LEVELS = 17  # grey levels of the digits
BATCH = 128
DECAY = 0.995


def model(width: int) -> Diffusion:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2,  # epsilon, and the variance
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    return Diffusion(network, scheduler, "epsilon", variance=LearnedVariance(levels=LEVELS))


def batches(images: Tensor) -> Iterator[Tensor]:
    source = generator(0, "order")
    while True:
        order = torch.randperm(len(images), generator=source)
        yield from (images[part] for part in order.split(BATCH) if len(part) == BATCH)


def train(own: Diffusion, images: Tensor, steps: int) -> tuple[Diffusion, dict[str, float]]:
    """Return the model with averaged weights, and the mean of both terms over the last tenth."""
    optimizer = torch.optim.AdamW(own.parameters(), lr=2e-3)
    averaged, last = copy.deepcopy(own).eval(), []
    for step, batch in zip(range(steps), batches(images), strict=False):
        estimate = own.loss(batch, generator(0, "train", step))
        optimizer.zero_grad()
        estimate.loss.backward()
        optimizer.step()
        with torch.no_grad():
            decay = min(DECAY, (1 + step) / (10 + step))
            for mean, now in zip(averaged.parameters(), own.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        if step >= 0.9 * steps:
            assert estimate.bound is not None
            last.append((estimate.per_draw.mean().item(), estimate.bound.mean().item()))
    simple, bound = (sum(each) / len(last) for each in zip(*last, strict=True))
    averaged.sample_shape = own.sample_shape
    return averaged, {"L_simple": simple, "L_vlb": bound / own.variance.weight}


def compare(own: Diffusion, steps: int, held_out: Tensor) -> None:
    """Print bits per dimension with their standard errors, and those of the difference."""
    bound = VariationalBound(None if steps == own.schedule.steps else steps, LEVELS, True)
    found = bound.bits_per_dimension(
        own.reverse_estimate, own.schedule, held_out, generator(0, "bound", steps)
    )
    for kind in VARIANCES:
        value, gap = found[kind], found[kind] - found["learned"]
        error, gap_error = (float(x.std()) / len(x) ** 0.5 for x in (value, gap))
        print(
            f"{steps:5d} steps, {kind:10}: {float(value.mean()):.3f} ± {error:.3f} bits/dim, "
            f"{float(gap.mean()):+.4f} ± {gap_error:.4f} from learned"
        )


def distances(own: Diffusion, steps: int, count: int, repeats: int, real: Tensor) -> None:
    """Print the mean Fréchet distance to real digits over sets of samples, and its error."""
    features = DigitFeatures()
    moments = _moments(features(real))
    for kind in VARIANCES:
        sampler = Sampler(DDPM(kind, clip_sample=True), steps=steps)
        sets = (own.sample(count, sampler=sampler, seed=seed) for seed in range(repeats))
        found = torch.stack([frechet_distance(*moments, *_moments(features(x))) for x in sets])
        error = float(found.std()) / repeats**0.5
        print(
            f"{steps:5d} steps, {kind:10}: Fréchet distance {float(found.mean()):.2f} ± "
            f"{error:.2f} (n = {count}, {repeats} sets)"
        )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.double().mean(dim=0), x.double().T.cov()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sets", type=int, default=5, help="sets of samples, two or more")
    parser.add_argument("--held-out", type=int, default=128, help="digits for the bound")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[25, 100, 1000])
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.width, options.timesteps = 10, 8, [2, 4]
        options.samples, options.sets, options.held_out = 20, 2, 4

    data = Digits()
    train_set, held_out_set = data.build_datasets()
    images, held_out = (torch.stack([row["image"] for row in x]) for x in (train_set, held_out_set))
    started = time.process_time()
    own, terms = train(model(options.width), images, options.steps)
    print(f"{options.steps} optimizer steps, {time.process_time() - started:.0f} core-seconds")
    print(", ".join(f"{name} {value:.3f}" for name, value in terms.items()))
    for steps in options.timesteps:
        compare(own, steps, held_out[: options.held_out])
    distances(own, min(options.timesteps), options.samples, options.sets, images)
    print(f"{time.process_time() - started:.0f} core-seconds in all")


if __name__ == "__main__":
    main()
