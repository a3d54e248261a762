"""Which weights judge a run, and their held-out loss in the course of it.

A saving is a ratio of steps, so the judge must keep ratios: an arm that takes the plain run's path
S times faster has to be judged S times faster. An average of a fixed decay does not keep them: it
lags by 1 / (1 - decay) steps, however few an arm needs. A power-function average (Karras et al.
2024, arXiv 2312.02696, equations 121 to 127) lags by a fixed part of the steps so far, 1 / (γ + 2).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from audit_against_training import HeldOutLoss
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_vr import DiffusionModule
from lightning_vr.lifecycle.ema import Averages

LENGTH = 0.1
"""Relative length of the average that judges, which lags by 11 % of the steps.

Chosen before any result: of the two lengths that Karras et al. keep, 0.05 and 0.1, the one that is
between those of their ImageNet-512 models (0.085 for size L, 0.13 for S). It also averages over
more of the few steps of a short run.
"""

DECAY = 0.98
"""Of the average that is reported beside it, which lags by 50 steps."""


class JudgedLoss(HeldOutLoss):
    """Held-out loss of several averages of the weights of one run, which it keeps itself.

    Args:
        every: Steps from one measurement to the next.
        repeats: Draws of each held-out sample.
        decays: Of exponential averages; 0 gives the weights that train.
        lengths: Of power-function averages.
        goals: Losses by name of an average; the run ends when all of them are reached.
    """

    def __init__(
        self,
        every: int,
        repeats: int,
        decays: Sequence[float] = (DECAY,),
        lengths: Sequence[float] = (LENGTH,),
        goals: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(every, repeats)
        self.averages = Averages(decays, lengths, warmup=False)
        self.goals = goals
        self.losses = {
            **{f"decay {each:g}": [] for each in decays},
            **{f"length {each:g}": [] for each in lengths},
        }

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        self.averages.update_parameters(module)
        if trainer.global_step % self.every:
            return
        self.steps.append(trainer.global_step)
        for losses, weights in zip(self.losses.values(), self.averages.weights, strict=True):
            with replaced(module, weights):
                losses.append(self.measure(module))
        if self.goals is not None:
            trainer.should_stop = all(min(self.losses[n]) <= x for n, x in self.goals.items())

    def last_losses(self) -> dict[str, float]:
        """Return the means over the last 30 % of the run."""
        first = int(0.7 * len(self.steps))
        return {name: sum(x[first:]) / len(x[first:]) for name, x in self.losses.items()}


@contextmanager
def replaced(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Put weights into a module for a while."""
    parameters = {name: p for name, p in module.named_parameters() if name in weights}
    own = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        copy_to(parameters, weights)
        yield
    finally:
        copy_to(parameters, own)


@torch.no_grad()
def copy_to(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    for name, p in parameters.items():
        p.copy_(weights[name])
