"""How excess loss is shown: a picture, a CSV file, and names for loggers."""

import csv
import math
from pathlib import Path

import torch
from torch import Tensor

from lightning_vr.callbacks.target_variance_report import numbers as numbers_by_level
from lightning_vr.variance.excess_loss import ExcessLoss, LossParts


def numbers(excess: ExcessLoss) -> dict[str, float]:
    """Name numbers as loggers take them: ``excess_loss/s0.5``, ``excess_loss/total``."""
    parts, total = excess.by_level(), excess.total()
    columns = {"excess_loss": parts.excess, "irreducible_loss": parts.irreducible}
    found = numbers_by_level(excess.noise_levels, columns, prefix="")
    totals = {
        "excess_loss/total": float(total.excess),
        "irreducible_loss/total": float(total.irreducible),
    }
    return found | {name: value for name, value in totals.items() if not math.isnan(value)}


def write_csv(excess: ExcessLoss, path: Path) -> None:
    """Write one row for each noise level."""
    parts = excess.by_level()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("noise_level", *LossParts._fields))
        writer.writerows(torch.stack([excess.noise_levels, *parts], dim=1).tolist())


def draw(excess: ExcessLoss, path: Path) -> None:
    """Draw loss, irreducible part and excess against the noise level, to a PNG.

    The axis is linear below the smallest loss that can be told from 0, as the excess may be
    negative by noise, and logarithmic above.
    """
    from matplotlib.figure import Figure

    parts, total = excess.by_level(), excess.total()
    levels = excess.noise_levels.numpy()
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log")
    axes.set_yscale("symlog", linthresh=_linear_below(parts))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot(levels, parts.loss.numpy(), "o-", markersize=3, color="black", label="loss")
    axes.plot(
        levels, parts.irreducible.numpy(), "--", color="tab:gray", label="irreducible (target)"
    )
    axes.plot(levels, parts.excess.numpy(), "o-", markersize=3, color="tab:red", label="excess")
    low, high = parts.excess - parts.excess_error, parts.excess + parts.excess_error
    axes.fill_between(levels, low.numpy(), high.numpy(), color="tab:red", alpha=0.2, linewidth=0)

    axes.set_xlabel("noise level  s = σ / α  (unit of the data)")
    axes.set_ylabel("loss per dimension")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(
        f"Distance from the optimum, ± one standard error\nin all: loss {float(total.loss):.3g} = "
        f"irreducible {float(total.irreducible):.3g} + excess {float(total.excess):.3g}"
    )
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _linear_below(parts: LossParts) -> float:
    known = _positive(parts.excess_error)
    known = known if len(known) else _positive(parts.loss)
    return float(known.median()) if len(known) else 1.0


def _positive(values: Tensor) -> Tensor:
    return values[values.isfinite() & (values > 0)]
