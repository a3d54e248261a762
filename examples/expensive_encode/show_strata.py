"""Draw what each scope of CARV's strata spans: 8 samples with 4 draws each.

    python examples/expensive_encode/show_strata.py

Each row is a sample and each point a draw, at its quantile of the proposal. The lowest row has all
draws of the step. The picture is ``runs/strata.png``.
"""

from pathlib import Path

import torch
from matplotlib import pyplot

from lightning_vr.core.rng import generator
from lightning_vr.core.types import WHOLE_STEP
from lightning_vr.estimators.carv import stratify

SAMPLES, RESAMPLES = 8, 4


def main():
    figure, panels = pyplot.subplots(1, 4, figsize=(11, 3), sharey=True, layout="constrained")
    rows = torch.arange(SAMPLES).repeat_interleave(RESAMPLES)
    for axes, scope in zip(panels, ("none", "sample", "global", "nested"), strict=True):
        source = generator("strata", 7)
        u = torch.rand(SAMPLES, RESAMPLES, generator=source, dtype=torch.float64)
        u = stratify(u, scope, WHOLE_STEP, source).flatten()
        fine = torch.linspace(0, 1, SAMPLES * RESAMPLES + 1)
        coarse = torch.linspace(0, 1, RESAMPLES + 1)
        if scope in ("global", "nested"):
            axes.vlines(fine, -2, -1, color="0.8", lw=0.6)
        if scope in ("sample", "nested"):
            axes.vlines(coarse, -0.5, SAMPLES - 0.5, color="0.8", lw=0.8)
        axes.scatter(u, rows, s=14, color="tab:blue")
        axes.scatter(u, torch.full_like(u, -1.5), s=50, marker="|", color="tab:orange", lw=1.2)
        axes.set(title=f'scope="{scope}"', xlabel="quantile of q", xlim=(0, 1))
        axes.set_yticks([-1.5, 0, SAMPLES - 1], ["all", "sample 1", f"sample {SAMPLES}"])
    path = Path("runs/strata.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"The picture is {path}.")


if __name__ == "__main__":
    main()
