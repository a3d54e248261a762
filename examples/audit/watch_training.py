"""What ``AuditDuringTraining`` takes of a run at its default cadence, in seconds of the processor.

A small network trains on the digits until two percent of its time are an audit: one of antithetic
pairs in three repetitions, as four estimators in six need a run of 20,000 steps. The seconds are
those of this process, which other work of the machine does not change.

    OMP_NUM_THREADS=1 python examples/audit/watch_training.py
"""

import argparse
import logging
import time
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer, seed_everything
from workloads import QUIET, adamw

from lightning_vr import (
    CARV,
    AuditDuringTraining,
    Candidate,
    Clean,
    DiffusionModule,
    ResidualMLP,
)
from lightning_vr.data import Digits


class FlatDigits(DiffusionModule):
    """Digits as vectors."""

    def encode(self, batch: Any) -> Clean:
        clean = super().encode(batch)
        return replace(clean, x0=clean.x0.flatten(1))


class TimedAudits(AuditDuringTraining):
    """Counts the seconds of the processor that it takes."""

    seconds = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        start = time.process_time()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.seconds += time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--every", type=int, help="steps from one audit to the next, not 2 %%")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.every = 20, 10
    seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = {"sigma_data": 0.75, "optimizer": adamw(1e-3)}
    module = FlatDigits(ResidualMLP(64, width=128), **settings)
    pairs = Candidate("pairs", draws=CARV(2, antithetic=True))
    watch = TimedAudits([pairs], every_n_steps=options.every, repetitions=3)
    start = time.process_time()
    trainer = Trainer(max_steps=options.steps, callbacks=[watch], **QUIET)
    trainer.fit(module, datamodule=Digits(batch_size=options.batch_size))
    total = time.process_time() - start
    share = watch.seconds / (total - watch.seconds)
    print(f"{options.steps} steps took {total:.0f} s, of which audits {watch.seconds:.1f} s:")
    print(f"{100 * share:.2f} % of the training without them.")
    print(watch.history.summary())


if __name__ == "__main__":
    main()
