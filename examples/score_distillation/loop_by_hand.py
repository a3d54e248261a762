"""How long does a step take, against one of a loop that is written by hand?

Both render one view of the scene of 3-D Gaussians (``scene.py``), noise it once by draws that are
keyed by the step, ask a U-Net of digits under guidance, and step Adam. CPU time, so that other work
on the machine hardly counts; in turn, so that what does counts for both.

    python examples/score_distillation/loop_by_hand.py
    python examples/score_distillation/loop_by_hand.py --quick
"""

import argparse
import itertools
import time
from collections.abc import Callable
from statistics import median

import torch
from diffusers import UNet2DModel
from scene import Gaussians
from score_distillation import GUIDANCE, RATE, VIEWS, unet
from torch.optim import Optimizer

from lightning_vr import CARV, VP, FrozenTeacher, ScoreDistillationLoss
from lightning_vr.core.rng import generator

DIGIT = 3


def ours(scene: Gaussians, network: UNet2DModel, optimizer: Optimizer) -> Callable[[], None]:
    """Return a function that makes a step by ``ScoreDistillationLoss``."""
    teacher = FrozenTeacher(network, VP(), num_classes=10, guidance=GUIDANCE)
    loss = ScoreDistillationLoss(teacher, CARV(1, scope="none"))
    label = torch.tensor([DIGIT])

    def step() -> None:
        view = VIEWS.draw(generator("view", loss.calls))
        found = loss(scene(view.azimuth, view.elevation), group=label)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        loss.advance()

    return step


def by_hand(scene: Gaussians, network: UNet2DModel, optimizer: Optimizer) -> Callable[[], None]:
    """Return a function that makes a step without this package, but for the view and alpha."""
    calls, labels, schedule = itertools.count(), torch.tensor([10, DIGIT]), VP()

    def step() -> None:
        call = next(calls)
        view = VIEWS.draw(generator("view", call))
        x = scene(view.azimuth, view.elevation)
        with torch.no_grad():
            source = torch.Generator().manual_seed(call)
            t = 0.02 + 0.96 * torch.rand(1, generator=source)
            noise = torch.randn(x.shape, generator=source)
            alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in schedule.scales(t))
            xt, time = alpha * x + sigma * noise, 1000 * t
            both = network(torch.cat([xt, xt]), torch.cat([time, time]), labels).sample
            null, text = both.chunk(2)
            gradient = alpha * sigma**2 * (null + GUIDANCE * (text - null) - noise)
        optimizer.zero_grad()
        (x * gradient).sum().backward()
        optimizer.step()

    return step


def milliseconds(step: Callable[[], None]) -> float:
    """Return the CPU time of a step."""
    start = time.process_time_ns()
    step()
    return (time.process_time_ns() - start) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    rounds = 5 if parser.parse_args().quick else 400
    torch.set_num_threads(1)  # CPU seconds are then those of the work
    # how fast it is does not depend on its weights
    network = unet().eval().requires_grad_(False)
    for size in (5, 8, 16):
        # both have the same tensors: where these lie in memory changes the time by more
        scene = Gaussians(supersampling=size)
        parts = scene, network, torch.optim.Adam(scene.parameters(), RATE)
        steps = {"own": ours(*parts), "other": by_hand(*parts)}
        found: dict[str, list[float]] = {"own": [], "other": []}
        for i in range(-3, rounds):
            for name in sorted(steps, reverse=i % 2 == 0):
                taken = milliseconds(steps[name])
                found[name] += [taken] * (i >= 0)
        own, other = (median(found[name]) for name in steps)
        extra = median(a - b for a, b in zip(*found.values(), strict=True))
        ratio = f"{own / other:.3f} times as long"
        print(f"S = {size}: {own:.2f} and {other:.2f} ms, {ratio}, {extra:.2f} ms more")


if __name__ == "__main__":
    main()
