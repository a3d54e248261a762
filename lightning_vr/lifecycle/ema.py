"""EMA: averages of the weights over training, sharded as the weights are.

After update t the average moves towards the weights, ``a ← β_t a + (1 - β_t) w``, with

* ``β_t = decay``, or ``min(decay, (1 + t) / (10 + t))`` with a warm-up, which lets the initial
  weights out early;
* ``β_t = (1 - 1/t)^(γ + 1)`` for an average of a relative length: past weights count in proportion
  to ``τ^γ``, so that it covers the same fraction of any run (Karras et al. 2024, arXiv 2312.02696,
  equations 121 to 127). The length is the standard deviation of that profile over t,
  ``(γ + 1)^½ (γ + 2)^-1 (γ + 3)^-½``. Those of other lengths are linear combinations of saved ones
  (``power_averages``).

Averages are taken elementwise and in float32 or better, of this rank's rows alone where weights are
sharded. Lightning's ``WeightAveraging`` copies the whole module, which sharded ones do not allow.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_vr.core.sharding import local, placed_like
from lightning_vr.core.validation import check_at_least
from lightning_vr.lifecycle.checkpoint_errors import damaged
from lightning_vr.lifecycle.power_averages import exponent
from lightning_vr.lifecycle.saved_parameters import for_each, once, saved_parameters

AVERAGES = "averaging_state"
"""Where a checkpoint keeps averages: what Lightning calls the rest of its own."""


class Averages:
    """Averages of a module's trained weights, and how many updates they have seen.

    Args:
        decays: Decay of each exponential average.
        lengths: Relative length of each power-function average; these come last.
        warmup: Whether exponential averages begin with smaller decays.

    Attributes:
        n_averaged: Number of updates, under Lightning's name.
        weights: For each average the weights by name, empty before the first update.
    """

    def __init__(self, decays: Sequence[float], lengths: Sequence[float], *, warmup: bool) -> None:
        self.decays, self.lengths, self.warmup = list(decays), list(lengths), warmup
        self.n_averaged = torch.zeros((), dtype=torch.long)
        self.weights: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def update_parameters(self, module: nn.Module) -> None:
        """Take in the weights as they are now; one that begins to train begins its average."""
        now = self._averaged(module)
        self.n_averaged += 1
        self.weights = self.weights or [{} for _ in self._factors(1)]
        # all averages have the same weights
        new = {name: p for name, p in now.items() if name not in self.weights[0]}
        old = once({name: p for name, p in now.items() if name not in new})
        for average, factor in zip(self.weights, self._factors(int(self.n_averaged)), strict=True):
            average |= for_each(new, lambda _, p: _precise(p.detach()))
            if not old:
                continue
            own = [local(average[name]) for name in old]
            weights = [local(p).to(a.dtype) for p, a in zip(old.values(), own, strict=True)]
            # as torch's AveragedModel rounds: lerp would differ in the last digit
            part = torch._foreach_mul(weights, 1 - factor)
            torch._foreach_mul_(own, factor)
            torch._foreach_add_(own, part)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "n_averaged": self.n_averaged,
            "decays": self.decays,
            "lengths": self.lengths,
            "weights": self.weights,
        }

    def load(self, state: Any, module: nn.Module, path: Any) -> None:
        """Continue from what a checkpoint keeps, sharded as the module is.

        Raises:
            ValueError: If it keeps other averages, or of other weights.
        """
        kept = (state.get("decays"), state.get("lengths")) if isinstance(state, dict) else None
        if kept != (self.decays, self.lengths):
            raise ValueError(
                f"`EMA` must keep the averages of the checkpoint {path} (decays and lengths "
                f"{kept}), got {(self.decays, self.lengths)}: configure the same, or leave EMA out."
            )
        count, saved = state.get("n_averaged"), state.get("weights")
        if not isinstance(count, Tensor) or count.numel() != 1:
            raise damaged(f"{AVERAGES}.n_averaged", "a number of updates", count, path)
        number = len(self._factors(1))
        if not isinstance(saved, list) or [type(x) for x in saved] != [dict] * number:
            raise damaged(f"{AVERAGES}.weights", f"a list of {number} averages", saved, path)
        own = self._averaged(module, saved[0])
        for average in saved:
            for name, p in own.items():
                if not isinstance(x := average.get(name), Tensor) or x.shape != p.shape:
                    raise damaged(f"{AVERAGES}.{name}", f"of shape {tuple(p.shape)}", x, path)
        self.n_averaged = count.clone()
        self.weights = [
            for_each(own, lambda name, p: _precise(placed_like(average[name], p)))  # noqa: B023
            for average in saved
        ]

    def _averaged(self, module: nn.Module, known: Any = ()) -> dict[str, nn.Parameter]:
        """Return the parameters that train, and those that have a (``known``) average already."""
        known = self.weights[0] if self.weights else known
        own = saved_parameters(module)
        return {name: p for name, p in own.items() if p.requires_grad or name in known}

    def _factors(self, count: int) -> list[float]:
        """Return the factor on each average at its update number ``count``."""
        most = (1 + count) / (10 + count) if self.warmup else 1.0
        powers = [(1 - 1 / count) ** (exponent(length) + 1) for length in self.lengths]
        return [min(decay, most) for decay in self.decays] + powers


class EMA(WeightAveraging):
    """Keeps averages of the weights; the first counts for evaluation, samples and export.

    It works in any module, on one device, with DDP and with ``ShardedStrategy``. Weights that never
    train, and buffers, are not averaged. All averages are in checkpoints: ``saved_average`` reads
    one of them, or one of another relative length::

        Trainer(callbacks=[EMA(decay=[0.999, 0.9999], relative_lengths=[0.05, 0.1])])

    Args:
        decay: Factor on an exponential average at each update, or on several; None for none.
        relative_lengths: Lengths of power-function averages as fractions of the run so far.
        warmup: Whether exponential averages begin with smaller factors.
        update_every_n_steps: Update after every n-th optimizer step.
        update_starting_at_step: Number of the first step that updates, from 0.

    Raises:
        ValueError: If a number is out of range, or there is no average.
    """

    def __init__(
        self,
        decay: float | list[float] | None = 0.999,
        relative_lengths: list[float] | None = None,
        warmup: bool = False,
        update_every_n_steps: int = 1,
        update_starting_at_step: int = 0,
    ) -> None:
        super().__init__()
        self.decays = [] if decay is None else decay if isinstance(decay, list) else [decay]
        self.lengths = relative_lengths or []
        for each in self.decays:
            if not 0 <= each < 1:
                raise ValueError(f"`decay` must be from 0 to below 1, got {each}: use 0.999.")
        for each in self.lengths:
            exponent(each)
        if not self.decays + self.lengths:
            raise ValueError(
                "`decay` must be given without `relative_lengths`, got None: use 0.999."
            )
        check_at_least("update_every_n_steps", update_every_n_steps, 1)
        check_at_least("update_starting_at_step", update_starting_at_step, 0)
        self.warmup = warmup
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        # those in whose place the average is: for a validation run, and from the end of a fit on
        self._swapped: dict[str, Tensor] = {}
        self._replaced: dict[str, Tensor] = {}

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether the step, from 0, updates the averages."""
        if step_idx is None:
            return False
        steps = step_idx - self.update_starting_at_step
        return steps >= 0 and steps % self.update_every_n_steps == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin without averages."""
        if stage == "fit":
            self._swapped, self._replaced = {}, {}
            found: Any = Averages(self.decays, self.lengths, warmup=self.warmup)
            self._average_model = found

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the averages, the first as the weights, and those that train as Lightning does."""
        averages: Any = self._average_model
        if averages is None or not averages.weights:
            return
        now, trained = checkpoint["state_dict"], self._replaced or self._swapped
        checkpoint["current_model_state"] = _with(now, trained)
        checkpoint["state_dict"] = _with(now, averages.weights[0])
        checkpoint[AVERAGES] = averages.state()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from saved averages and the weights that train; without any, begin anew."""
        averages: Any = self._average_model
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        if averages is None or not is_fitting or "current_model_state" not in checkpoint:
            return
        averages.load(checkpoint.get(AVERAGES), pl_module, trainer.ckpt_path)
        weights = {"state_dict": checkpoint["current_model_state"]}
        trainer.strategy.load_model_state_dict(weights, strict=pl_module.strict_loading)

    @torch.no_grad()
    def _swap_models(self, pl_module: LightningModule) -> None:
        """Put the first average into the module, or the weights that train back."""
        if self._swapped:
            _copy(self._swapped, pl_module)
            self._swapped = {}
        else:
            self._swapped = self._put_average(pl_module, lambda _, p: p.detach().clone())

    @torch.no_grad()
    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        """Put the first average into the module, to stay."""
        self._replaced = self._put_average(pl_module, lambda _, p: aside(p))

    def _put_average(
        self, module: LightningModule, keep: Callable[[str, nn.Parameter], Tensor]
    ) -> dict[str, Tensor]:
        """Put the first average into the module, and return what was there; nothing without one."""
        averages: Any = self._average_model
        if not averages.weights:
            return {}
        own = saved_parameters(module)
        before = for_each({name: own[name] for name in averages.weights[0]}, keep)
        _copy(averages.weights[0], module)
        return before


def aside(x: Tensor) -> Tensor:
    """Return a copy of a weight on the CPU, as a device may have no room, or of its own rows."""
    return x.detach().clone() if isinstance(x, DTensor) else x.detach().to("cpu", copy=True)


def _with(state: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return a state with some of its weights replaced, in its own dtypes."""
    own = {name: x.to(state[name].dtype) for name, x in weights.items() if name in state}
    return state | own


def _copy(weights: dict[str, Tensor], module: nn.Module) -> None:
    for name, p in once(saved_parameters(module)).items():
        if name in weights:
            local(p).copy_(local(weights[name]))


def _precise(x: Tensor) -> Tensor:
    """Return a copy in float32 or better: small steps would be lost in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
