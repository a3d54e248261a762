"""Plain target against STF under each sampler: the two columns of tables 1 and 2.

Source: Xu, Tong and Jaakkola 2023, arXiv 2302.00670, tables 1 and 2.
"""

from digits_models import JOBS, frechet, model
from study import Study, Table, interval, markdown

from lightning_vr import DDIM, RK45, PredictorCorrector, Sampler

TOLERANCE = 1e-3
SAMPLERS = {
    "vp, DDIM, 25 steps": Sampler(DDIM(), steps=25),
    "vp, RK45": Sampler(RK45(TOLERANCE, TOLERANCE)),
    "ve, PC, 50 levels": Sampler(PredictorCorrector(), steps=50),
    "ve, RK45": Sampler(RK45(TOLERANCE, TOLERANCE)),
}
SEEDS = (0, 1, 2)


def run(study: Study) -> None:
    keys = ("sampler", "target", "seed")
    table = Table(study.folder / "stf_samplers.csv", keys, ("distance", "evaluations"))
    seeds, count = ((0,), 64) if study.is_quick else (SEEDS, 1000)
    try:
        for name in SAMPLERS:
            for seed in seeds:
                measure(table, study, name, seed, count)
    finally:
        report(table)


def measure(table: Table, study: Study, name: str, seed: int, count: int) -> None:
    for target in ("n = 1", "n = all"):
        if table.has(name, target, seed):
            continue
        study.check_time()
        job = f"{name.split(',')[0]}, {target}"
        found, _ = model(job, seed, 4 if study.is_quick else JOBS[job].steps, study)
        distance = frechet(found, SAMPLERS[name], count, seed)
        calls = found.sample_evaluations
        table.add(sampler=name, target=target, seed=seed, distance=distance, evaluations=calls)


def report(table: Table) -> None:
    rows = []
    for name in SAMPLERS:
        plain, stable = (
            table.select("distance", sampler=name, target=f"n = {n}") for n in ("1", "all")
        )
        if not plain or len(plain) != len(stable):
            continue
        calls = [
            sum(found) / len(found)
            for n in ("1", "all")
            for found in [table.select("evaluations", sampler=name, target=f"n = {n}")]
        ]
        gain = interval([a - b for a, b in zip(plain, stable, strict=True)], 2)
        cells = interval(plain, 2), interval(stable, 2), gain, f"{calls[0]:.0f}, {calls[1]:.0f}"
        rows.append((name, *cells))
    print(markdown(("sampler", "plain", "STF", "plain less STF", "network calls"), rows))
