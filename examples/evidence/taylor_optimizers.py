"""Does what a control variate gains depend on the optimizer? SGD beside Adam, small batches.

Eight Gaussians, an MLP, 32 draws a step, unit weight on the score at noise levels from 0.03 to 1.
Each arm and optimizer has the learning rate of three that is best for it.
Source: Jeha et al. 2024, arXiv 2408.12270: the choice of the optimizer impacts effectiveness.
"""

from functools import partial

import torch
from lightning.pytorch import Trainer, seed_everything
from study import Study, Table, interval, markdown, mean_and_half

from lightning_vr import CARV, VE, DiffusionModule, ResidualMLP, TaylorCV, UnitWeighting
from lightning_vr.core.rng import generator
from lightning_vr.data import EightGaussians

ARMS = {
    "plain": (32, dict),
    "16 pairs": (16, lambda: {"draws": CARV(2, scope="none", antithetic=True)}),
    "order 0": (32, lambda: {"control_variate": control()}),
}
RATES = {"SGD": (1e-5, 1e-4, 1e-3), "Adam": (3e-4, 1e-3, 3e-3)}
LEVEL = 0.1


def control() -> TaylorCV:
    return TaylorCV(gate="open", refit_every_n_steps=100)


def run(study: Study) -> None:
    keys = ("optimizer", "rate", "arm", "seed")
    table = Table(study.folder / "taylor_optimizers.csv", keys, ("error",))
    seeds, steps = (1, 4) if study.is_quick else (3, 1000)
    try:
        for seed in range(seeds):
            for optimizer, rates in RATES.items():
                for rate in rates:
                    for arm in ARMS:
                        if not table.has(optimizer, rate, arm, seed):
                            study.check_time()
                            error = trained_error(optimizer, rate, arm, seed, steps)
                            row = {"optimizer": optimizer, "rate": rate, "arm": arm, "seed": seed}
                            table.add(**row, error=error)
    finally:
        report(table)


def report(table: Table) -> None:
    rows = []
    for optimizer, rates in RATES.items():
        for arm in ARMS:
            found = {
                rate: table.select("error", optimizer=optimizer, rate=rate, arm=arm)
                for rate in rates
            }
            if not all(found.values()):
                continue
            best = min(rates, key=lambda rate: mean_and_half(found[rate])[0])
            others = [f"{mean_and_half(found[rate])[0]:.2f}" for rate in rates]
            rows.append((optimizer, arm, f"{best:g}", interval(found[best]), ", ".join(others)))
    header = ("optimizer", "arm", "best rate", f"error of the score at s = {LEVEL:g}", "all rates")
    print(markdown(header, rows))


def trained_error(optimizer: str, rate: float, arm: str, seed: int, steps: int) -> float:
    """Return ``E ‖s_hat - s‖² / E ‖s‖²`` of the score s after so many steps."""
    seed_everything(seed, verbose=False)
    batch_size, slots = ARMS[arm]
    module = DiffusionModule(
        ResidualMLP(2, width=64),
        schedule=VE(0.03, 1.0),
        prediction="score",
        weighting=UnitWeighting("score"),
        optimizer=partial(getattr(torch.optim, optimizer), lr=rate),
        **slots(),
    )
    data = EightGaussians(batch_size=batch_size, num_samples=16384)
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    source = generator("optimizers")
    x0, _ = data.draw(4096, source)
    x0 = x0.float()
    xt = x0 + LEVEL * torch.randn(x0.shape, generator=source)
    mean = data.mixture.posterior_mean(xt, 1.0, LEVEL)
    with torch.no_grad():
        t = module.schedule.time(torch.full((len(xt),), LEVEL))
        error = module.denoise(xt, t) - mean
    return float(error.square().sum() / (xt - mean).square().sum())
