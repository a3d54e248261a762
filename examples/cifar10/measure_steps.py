"""Measure a training step of ``fit`` against a bare loop of torch with the same work, in turn.

    python examples/cifar10/measure_steps.py configs/cifar10.yaml --data.num_workers 12
    python examples/cifar10/measure_steps.py configs/digits_dsm.yaml

The bare loop has the configuration's network, optimizer, precision, clipping and data, and its
objective written by hand, as EDM's with plain targets: for both, ``schedule`` and ``prediction``
are set to these. Segments of both alternate within one run. ``--segments`` and ``--steps`` set
their number and length, ``--targets`` what ``fit`` regresses on; other flags go to the command line
of the package. It prints one line for each target, and the hours of the configuration's steps. On a
CPU times are CPU seconds of the process, whatever else the machine does.
"""

import argparse
import copy
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_vr import DiffusionModule
from lightning_vr.cli.vr_cli import VRCLI
from lightning_vr.data.datamodule import SplitDataModule

TARGETS = {
    "DSM": ["--model.target=DSM"],
    "STF(4096)": ["--model.target=STF", "--model.target.references=4096"],
    "STF(all)": ["--model.target=STF", "--model.target.references=all"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--segments", type=int, default=6, help="of each; the first is dropped")
    parser.add_argument("--steps", type=int, default=20, help="in a segment")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=["DSM"])
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options, flags = parser.parse_known_args()
    if options.quick:
        options.segments = options.steps = 2
    with open(options.config) as file:
        settings = yaml.safe_load(file)["trainer"]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for target in options.targets:
        ours, bare = measure(options, [*flags, *TARGETS[target]], settings)
        ratios = [a / b for a, b in zip(ours, bare, strict=True)]
        ms = 1e3 * statistics.median(ours)
        print(
            f"{device}, {target}: fit {ms:.2f} ms, bare loop {1e3 * statistics.median(bare):.2f} "
            f"ms, ratio {statistics.median(ratios):.3f} (of segments from {min(ratios):.3f} to "
            f"{max(ratios):.3f}); {settings['max_steps']} steps take "
            f"{ms * settings['max_steps'] / 3.6e6:.2g} h",
            flush=True,
        )


def measure(
    options: argparse.Namespace, flags: list[str], settings: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """Return seconds of a step of each segment, of ``fit`` and of the bare loop."""
    edm = ["--model.schedule=EDM", "--model.prediction=edm", "--trainer.accelerator=auto"]
    cli = VRCLI(args=["--config", options.config, *edm, *flags], run=False)
    cli.datamodule.setup("fit")
    turns = InTurn(BareLoop(cli.model, cli.datamodule, settings), options.steps)
    trainer = Trainer(
        max_steps=options.segments * options.steps + 1,  # a segment ends where the next begins
        max_epochs=-1,
        precision=settings.get("precision"),
        gradient_clip_val=settings.get("gradient_clip_val"),
        devices=1,
        callbacks=[turns],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(cli.model, cli.datamodule)
    return turns.ours[1:], turns.bare[1:]


class BareLoop:
    """A training step as one writes it without a framework.

    Args:
        module: Has the network and the optimizer, of which the loop has copies.
        data: Gives the batches.
        settings: The configuration's trainer.
    """

    def __init__(
        self, module: DiffusionModule, data: SplitDataModule, settings: dict[str, Any]
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        copied = copy.deepcopy(module).to(self.device)
        made = copied.configure_optimizers()
        self.optimizer = made["optimizer"] if isinstance(made, dict) else made
        self.schedule = made["lr_scheduler"]["scheduler"] if isinstance(made, dict) else None
        self.network, self.classes = copied.network, copied.num_classes
        self.dropout, self.std = copied.label_dropout, copied.sigma_data
        self.clip = settings.get("gradient_clip_val")
        self.is_half = settings.get("precision") == "bf16-mixed"
        self.batches: Iterator[dict[str, Tensor]] = itertools.chain.from_iterable(
            itertools.repeat(data.train_dataloader())
        )

    def step(self) -> None:
        """Train for one step."""
        x0, labels = self._batch()
        s = torch.exp(1.2 * torch.randn(len(x0), device=self.device) - 1.2)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_half):
            loss = plain_loss(self.network, x0, s, torch.randn_like(x0), self.std, labels)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def _batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        batch = next(self.batches)
        x0 = batch["image" if "image" in batch else "x0"].to(self.device, non_blocking=True)
        if self.classes is None:
            return x0, {}
        label = batch["label"].to(self.device, non_blocking=True)
        dropped = torch.rand(len(x0), device=self.device) < self.dropout
        return x0, {"class_labels": torch.where(dropped, self.classes, label)}


def plain_loss(
    network: nn.Module, x0: Tensor, s: Tensor, noise: Tensor, std: float, labels: dict[str, Tensor]
) -> Tensor:
    """Return the denoising loss of EDM (arXiv 2206.00364, table 1 and equation 8).

    Args:
        network: The network.
        x0: Clean samples ``(B, *)``.
        s: Noise levels ``(B,)``.
        noise: Standard normal noise ``(B, *)``.
        std: Standard deviation of the data.
        labels: Labels by the name of the network's argument.
    """
    sigma = s.reshape(-1, *[1] * (x0.ndim - 1))
    xt = x0 + sigma * noise
    total = (sigma**2 + std**2).sqrt()
    output = network(xt / total, 250 * s.log(), **labels)
    output = getattr(output, "sample", output)  # of diffusers
    target = (x0 - (std / total) ** 2 * xt) * total / (sigma * std)
    return (output.float() - target).square().mean()


class InTurn(Callback):
    """Times segments of a fit and, after each, one of a bare loop.

    Args:
        loop: The bare loop.
        steps: Steps in a segment.
    """

    def __init__(self, loop: BareLoop, steps: int) -> None:
        self.loop, self.steps = loop, steps
        self.ours: list[float] = []
        self.bare: list[float] = []
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the first segment."""
        self._start = now()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """End a segment of the fit, and time one of the bare loop."""
        if trainer.global_step % self.steps or trainer.global_step == 0:
            return
        self.ours.append((now() - self._start) / self.steps)
        self.bare.append(timed(self.loop.step, self.steps))
        self._start = now()


def timed(step: Callable[[], None], steps: int) -> float:
    """Return the seconds of a step."""
    start = now()
    for _ in range(steps):
        step()
    return (now() - start) / steps


def now() -> float:
    """Return the time when the device has done all work; on a CPU the process's own."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
