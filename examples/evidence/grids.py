"""Polynomial against exponential noise levels, for a poorly and a well trained network of digits.

Source: Wang, He and Tao 2024, arXiv 2406.12839, table 2: the exponential grid for a well trained
score, the polynomial one for a poor one. Mixtures with a known error: ``examples/error_budget``.
"""

from digits_models import frechet, model
from study import Study, Table, interval, markdown

from lightning_vr import Diffusion, Euler, Heun, Sampler

KINDS = ("polynomial", "exponential")
SEEDS = (0, 1, 2)


def run(study: Study) -> None:
    keys = ("step", "solver", "levels", "seed", "noise", "grid")
    table = Table(study.folder / "grids.csv", keys, ("distance",))
    seeds, noises, levels, count = (
        ((0,), 1, (4,), 64) if study.is_quick else (SEEDS, 2, (8, 16, 32), 1000)
    )
    for step in (4, 2) if study.is_quick else (800, 100):
        for seed in seeds:
            found, _ = model("edm, n = 1", seed, step, study)
            for n in levels:
                for noise in range(noises):
                    for kind in KINDS:
                        measure(table, study, found, (step, n, seed, noise, kind), count)
    report(table)


def measure(table: Table, study: Study, found: Diffusion, case: tuple, count: int) -> None:
    step, n, seed, noise, kind = case
    for solver in (Euler(), Heun()) if n < 32 else (Euler(),):
        name = type(solver).__name__
        if table.has(step, name, n, seed, noise, kind):
            continue
        study.check_time()
        distance = frechet(found, Sampler(solver, steps=n, grid=kind), count, noise)
        row = {"step": step, "solver": name, "levels": n, "seed": seed, "noise": noise}
        table.add(**row, grid=kind, distance=distance)


def report(table: Table) -> None:
    rows = []
    cases = dict.fromkeys((row["step"], row["solver"], row["levels"]) for row in table.rows)
    for step, solver, levels in cases:
        key = {"step": step, "solver": solver, "levels": levels}
        seeds = dict.fromkeys(row["seed"] for row in table.rows)
        means = {
            kind: [
                sum(found) / len(found)
                for seed in seeds
                for found in [table.select("distance", **key, seed=seed, grid=kind)]
            ]
            for kind in KINDS
        }
        less = [a - b for a, b in zip(means["polynomial"], means["exponential"], strict=True)]
        cells = (interval(means[kind], 2) for kind in KINDS)
        rows.append((step, solver, levels, *cells, interval(less, 2)))
    header = ("steps of training", "solver", "levels", *KINDS, "polynomial less exponential")
    print(markdown(header, rows))
