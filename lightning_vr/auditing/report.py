"""Reports of an audit: a table, a page, a picture, and all numbers as JSON."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_vr.auditing.measured_estimator import MeasuredEstimator
from lightning_vr.auditing.result import Audit
from lightning_vr.callbacks.gradient_variance_report import draw_components
from lightning_vr.callbacks.pictures import frees_figure, save_figure
from lightning_vr.lifecycle.atomic_files import replacing
from lightning_vr.lifecycle.loggers import level_names
from lightning_vr.variance.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADERS = ("estimator", "variance", "parts", "ms", "RE", "ECM", "saving")

RECOMMENDED = "recommended.yaml"
"""A second ``--config``, beside the audit of what it recommends."""


def table(audit: Audit) -> Table:
    """Return one row for each estimator."""
    shown = Table(title="Audit", caption=_caption(audit), caption_justify="left", box=SIMPLE_HEAD)
    shown.pad_edge, shown.collapse_padding = False, True
    for header in _HEADERS:
        justify: Any = "left" if header == "estimator" else "right"
        # long names wrap, numbers do not
        shown.add_column(header, justify=justify, no_wrap=header != "estimator")
    for measured in audit.estimators:
        shown.add_row(*_row(measured), style="bold" if measured is audit.recommended else None)
    return shown


def save(audit: Audit, folder: str | Path) -> None:
    """Write ``audit.json``, ``audit.md`` and ``audit.png`` to a folder, made if it is missing.

    With a recommendation that a configuration can select, ``recommended.yaml`` is such a one, to be
    given after that of the module; without, an earlier one is removed.
    """
    folder = Path(folder)
    texts = {
        "audit.json": json.dumps(audit.to_dict(), indent=2, allow_nan=False),
        "audit.md": page(audit),
    }
    if audit.config:
        texts[RECOMMENDED] = audit.config
    else:
        (folder / RECOMMENDED).unlink(missing_ok=True)
    for name, text in texts.items():
        with replacing(folder / name, "w", encoding="utf-8") as file:
            file.write(text)
    draw(audit, folder / "audit.png")


def page(audit: Audit) -> str:
    """Return the audit as Markdown."""
    rows = [_HEADERS, ["---"] * len(_HEADERS), *(_row(m) for m in audit.estimators)]
    lines = ["# Audit", "", f"**{audit.advice}**", ""]
    if audit.config:
        lines += ["```yaml", audit.config.rstrip(), "```", ""]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", _caption(audit), ""]
    lines += [f"- {line}" for line in not_measured(audit)]
    lines += ["", "![audit](audit.png)", ""]
    return "\n".join(lines)


@frees_figure
def draw(audit: Audit, path: Path) -> None:
    """Draw the parts of each estimator's variance, by noise level, and what each saves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    parts, levels, saving = figure.subplots(1, 3)
    _draw_estimators(parts, audit)
    names = level_names(audit.statistics.noise_levels)
    measured = audit.statistics
    draw_components(levels, measured.levels, names, measured.levels_error, measured.parts)
    levels.set_title("current estimator, by noise level")
    levels.set_xlabel("noise level  s = σ / α, in the middle of equally likely bins")
    _draw_savings(saving, audit)
    save_figure(figure, path)


def _row(measured: MeasuredEstimator) -> list[str]:
    total, error = float(measured.components.total[0]), float(measured.errors.total[0])
    # without noise at all, as in pairs of a linear network, there are no parts
    percent = [100 * float(part[0]) / total if total else 0.0 for part in measured.components[:3]]
    variance = _short(total, 3) if math.isnan(error) else f"{_short(total, 3)} ± {_short(error, 1)}"
    return [
        f"{measured.name} *" if measured.is_finalist else measured.name,
        variance,
        "/".join(f"{value:.0f}" for value in percent),
        f"{1e3 * measured.seconds:.1f}",
        f"{measured.efficiency.estimate:.2f}",
        f"{measured.multiplier.estimate:.2f}",
        _interval(measured.predicted_speedup),
    ]


def _short(value: float, digits: int) -> str:
    return np.format_float_positional(value, digits, unique=False, fractional=False, trim="-")


def _interval(interval: Interval) -> str:
    if interval.low == interval.high:
        return f"{interval.estimate:.2f}"
    return f"{interval.estimate:.2f} ({interval.low:.2f}, {interval.high:.2f})"


def _caption(audit: Audit) -> str:
    noise = (
        f"{audit.noise_ratio:.3g}" if math.isfinite(audit.noise_ratio) else "too large to resolve"
    )
    again = f"{audit.repetitions} repetitions"
    if audit.finalists:
        again += (
            f", and {audit.second_repetitions} of the finalists (*) on fresh draws, which alone "
            f"give their numbers"
        )
    return (
        f"Variance: that of the gradient of a batch of {audit.batch}, times the batch size, ± one "
        f"standard error. Parts: {'/'.join(audit.statistics.parts)} in %. ms: a training step. "
        f"RE: variance of the current estimator over that of this one. ECM: RE times the current "
        f"step's time over this one's. Saving: how many times less compute the noise-ratio model "
        f"expects for the same loss, with its 95 % interval; a recommendation needs the wider one "
        f"that holds for all finalists at once. {again}, in {audit.seconds:.0f} s of a budget of "
        f"{audit.budget:g}. Noise over signal of the batch gradient: {noise}. {_resamples(audit)}"
    )


def not_measured(audit: Audit) -> list[str]:
    """Return a line for each candidate that could not be measured, and why."""
    return [f"Not measured: {name}: {why}." for name, why in audit.skipped.items()]


def _resamples(audit: Audit) -> str:
    if audit.resamples is None:
        return (
            f"How many noise draws per {audit.unit} are best is not resolved: passes of fewer and "
            f"of more draws take equally long within error."
        )
    best, gain = audit.resamples
    present = audit.current.draws_per_sample
    if best == present == 1:
        return f"Components and cost say that one noise draw per {audit.unit} is best."
    if best == present:
        return f"Components and cost say that {best} noise draws per {audit.unit} are best, as now."
    draws = f"one noise draw per {audit.unit} has"
    if best > 1:
        draws = f"{best} noise draws per {audit.unit} have"
    return f"By components and cost, {draws} an ECM of {gain:.2f} over the present {present}."


def _draw_estimators(axes: "Axes", audit: Audit) -> None:
    at, base = np.arange(len(audit.estimators)), np.zeros(len(audit.estimators))
    colors = ("tab:red", "tab:orange", "tab:blue")
    for i, color in zip((2, 1, 0), colors, strict=True):
        height = [max(0.0, float(m.components[i][0])) for m in audit.estimators]
        axes.bar(at, height, bottom=base, color=color, label=audit.statistics.parts[i])
        base += np.array(height)
    axes.set_xticks(at, [m.name for m in audit.estimators], rotation=45, ha="right")
    axes.set_title("gradient variance × batch size, by source")
    axes.legend()


def _draw_savings(axes: "Axes", audit: Audit) -> None:
    rivals = audit.estimators[1:]
    at = np.arange(len(rivals))
    for i, measured in zip(at, rivals, strict=True):
        kinds = (("ECM", measured.multiplier, 0.1), ("saving", measured.predicted_speedup, -0.1))
        for color, (label, found, shift) in zip(("tab:blue", "tab:orange"), kinds, strict=True):
            ends = [min(end, 10.0) for end in (found.low, found.high)]
            axes.plot(
                ends, [i + shift] * 2, color=color, linewidth=2, label=label if i == 0 else ""
            )
            axes.plot(min(found.estimate, 10.0), i + shift, "o", color=color)
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(at, [m.name for m in rivals])
    axes.set_xlabel("ECM and predicted saving, 95 % intervals")
    axes.set_title("what each would save")
    if rivals:
        axes.legend()
    axes.grid(axis="x", alpha=0.3)
