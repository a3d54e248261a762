"""An audit at a checkpoint of CIFAR-10: what each estimator would save from there on.

A U-Net of a million parameters trains plainly with VE for 150 steps, and is audited there with one
candidate for each part of the noise. With all images as references the posterior is exact: no
target has less variance.
"""

from pathlib import Path

import torch
from digits_models import LEARNING_RATE
from lightning.pytorch import Trainer, seed_everything
from study import Study, processor_clock
from taylor_mnist import unet

from lightning_vr import CARV, STF, VE, Candidate, DiffusionModule, TaylorCV, audit
from lightning_vr.auditing import save_report
from lightning_vr.data import ImageFolder
from lightning_vr.estimators.proposals import LearnedProposal


def run(study: Study) -> None:
    path = study.images("cifar10")
    if path is None:
        return
    folder = study.folder / "cifar10_audit"
    if not (folder / "audit.md").exists():
        study.check_time()
        measure(path, folder, study.is_quick)
    print((folder / "audit.md").read_text())


def measure(path: Path, folder: Path, is_quick: bool) -> None:
    """Train a module, or take the checkpoint of an earlier call, and audit it."""
    seed_everything(0, verbose=False)
    steps, batch, channels = (2, 2, [8, 8, 16]) if is_quick else (150, 32, [32, 64, 64])
    module = DiffusionModule(
        unet(channels, 32, 3),
        VE(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE),
    )
    data = ImageFolder(path, 32, batch, validation_fraction=0.02)
    folder.mkdir(exist_ok=True)
    checkpoint = folder / "weights.pt"
    if not checkpoint.exists():
        Trainer(
            accelerator="cpu",
            max_steps=steps,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, datamodule=data)
        torch.save(module.network.state_dict(), checkpoint)
    module.network.load_state_dict(torch.load(checkpoint, weights_only=True))
    with processor_clock():
        found = audit(module, data, candidates(), budget=1.0 if is_quick else 100.0, progress=False)
    save_report(found, folder)


def candidates() -> list[Candidate]:
    return [
        Candidate("STF(1024)", target=STF(1024)),
        Candidate('STF("all")', target=STF("all")),
        Candidate("strata, q learned", draws=CARV(1, LearnedProposal())),
        Candidate("pairs", draws=CARV(2, antithetic=True)),
        Candidate("Taylor 0, all draws", control_variate=TaylorCV(gate="open")),
    ]
