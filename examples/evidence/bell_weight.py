"""A bell-shaped total weight against others, at equal steps.

Each objective draws noise levels from a density of log s and weighs EDM's network equally, so that
all have the same cost and differ alone in where the weight lies.
Source: Wang, He and Tao 2024, arXiv 2406.12839: a bell emerges as the optimal total weight.
"""

from digits_models import frechet, model
from study import Study, Table, interval, markdown

from lightning_vr import Sampler

ARMS = {
    "bell, as EDM": "bell, n = 1",
    "flat in log s": "flat, n = 1",
    "mostly low noise": "low, n = 1",
    "mostly high noise": "high, n = 1",
}
SEEDS = (0, 1, 2)


def run(study: Study) -> None:
    table = Table(study.folder / "bell_weight.csv", ("arm", "seed", "step"), ("distance",))
    seeds, step = ((0,), 4) if study.is_quick else (SEEDS, 400)
    count, sampler = (64, Sampler(steps=2)) if study.is_quick else (1000, Sampler(steps=18))
    try:
        for seed in seeds:
            for arm, name in ARMS.items():
                if not table.has(arm, seed, step):
                    found, _ = model(name, seed, step, study)
                    study.check_time()
                    distance = frechet(found, sampler, count, seed)
                    table.add(arm=arm, seed=seed, step=step, distance=distance)
    finally:
        report(table, step)


def report(table: Table, step: int) -> None:
    rows = []
    for arm in ARMS:
        own, bell = (table.select("distance", arm=a, step=step) for a in (arm, next(iter(ARMS))))
        if own:
            more = [a - b for a, b in zip(own, bell, strict=False)]
            rows.append((arm, interval(own, 2), interval(more, 2)))
    print(markdown(("density of the noise level", "distance", "more than the bell"), rows))
