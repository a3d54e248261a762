"""Ways to measure gradient variance while a trainer runs, for GradientVariance.

* ``NestedProbe``: a loss whose times and noise can be drawn again. Components, in bins of the noise
  level too, per sample where that tells all and by differences of batches elsewhere.
* ``MicroBatchProbe``: any module under gradient accumulation or DDP. Hooks on the parameters see
  the gradient of each micro-batch, and the optimizer's gradient is that of all: free, at each step.
* ``HalfBatchProbe``, in ``half_batches``: any other module, by its training step.

The last two know nothing of the loss, and tell the total variance alone.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_vr.core.batches import batch_size, take_rows
from lightning_vr.core.devices import widest_float
from lightning_vr.core.distributed import all_reduce_sum, least, rank, world_size
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator, preserve_global_rng, seed_global_rng
from lightning_vr.core.types import Clean
from lightning_vr.lifecycle.precision import loss_scale, unscales_itself
from lightning_vr.variance.components import Components, two_batch_sizes
from lightning_vr.variance.gradient_measurement import GradientMeasurement, NoisyLoss

_PER_SAMPLE_COST = 5.0
"""Cost of a per-sample gradient over that of one draw in a batch, as measured on a U-Net."""


ProbeResult = tuple[Components, dict[int, Components]]
"""Components of the whole gradient, by group, and of bins of the noise level."""


class GradientProbe:
    """Measures during training.

    Args:
        trainer: The trainer.
        module: The module that it trains.

    Attributes:
        names: Names of the groups of parameters.
        trainable: Names of the parameters that are trained.
        noise_levels: Noise level in the middle of each bin that is told apart ``(L,)``.
        cost: About how many training steps one measurement costs.
    """

    cost: float = 0.0

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer = trainer
        self.module = module
        self.names, self.groups = parameter_groups(module)
        self.trainable = trainable_names(module)
        self.noise_levels = torch.zeros(0)

    @property
    def loss_scale(self) -> float:
        """Factor on losses in float16."""
        return loss_scale(self.trainer)

    def prepare(self, batch: Any) -> None:
        """Look at the first batch: choose a method, refuse what cannot be measured."""

    def before_any_batch(self, batch: Any) -> None:
        """See every batch before it is trained on."""

    def before_batch(self, batch: Any, batch_idx: int, number: int) -> ProbeResult | None:
        """Measure on a batch that is due."""
        return None

    def before_backward(self) -> None:
        """See that the batch has a loss: a training step may return none."""

    def before_optimizer_step(self) -> Components | None:
        """Measure on the gradient that the optimizer is about to use."""
        return None

    def kept(self) -> Any:
        """Return a batch that waits to be measured with the next one, or None."""
        return None

    def keep(self, batch: Any) -> None:
        """Take such a batch from a checkpoint."""

    def close(self) -> None:
        """Leave no hook behind."""

    def source(self, *key: int | str) -> torch.Generator:
        """Return the generator of this run, this rank, this step and ``key``."""
        seed = getattr(self.module, "run_seed", torch.initial_seed() % 2**63)
        step = self.trainer.global_step
        return generator(seed, rank(), "gradient variance", step, *key, device=self.module.device)


class NestedProbe(GradientProbe):
    """Measures components of a loss whose times and noise can be drawn again.

    Args:
        trainer: The trainer.
        module: The module that it trains.
        loss: Its loss.
        clean: A function from a batch to clean samples.
        samples: Number of samples whose gradients are taken one by one.
        noise_levels: Noise level in the middle of each equally likely bin, measured in turn.
        sketch: As ``GradientMeasurement`` takes it.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        loss: NoisyLoss,
        clean: Any,
        *,
        samples: int,
        noise_levels: Tensor,
        sketch: int | None,
    ) -> None:
        super().__init__(trainer, module)
        self.measurement = GradientMeasurement(loss, self.source, self.groups, sketch=sketch)
        self.clean = clean
        self.samples = samples
        self.noise_levels = noise_levels
        self.is_per_sample = False
        self._pair: list[Any] = [None]

    def prepare(self, batch: Any) -> None:
        why_unavailable: str | None = "a batch holds one sample"
        size = self._least(batch_size(batch))
        if size > 1:
            clean = self._encode(batch, 2)
            if not self.measurement.loss.couples_rows:
                # what a forward pass moves to the device and keeps, it moves outside functorch
                self.measurement.by_differences([clean, clean], "prepare")
            with _SameTensors():
                why_unavailable = self.measurement.why_unavailable(clean)
        # an why_unavailable such as too little memory may stand on one rank alone
        self.is_per_sample = self._least(why_unavailable is None) == 1
        if self.is_per_sample:
            self.cost = _PER_SAMPLE_COST * 8 * self.samples / size
            rank_zero_info("GradientVariance measures per-sample gradients.")
        else:
            self.cost = 16.0  # two batches, four passes each, for the whole and for a bin
            rank_zero_info(
                f"GradientVariance measures by differences of batches: "
                f"{why_unavailable or 'another rank cannot measure per sample'}."
            )

    def kept(self) -> Any:
        return self._pair[-1]

    def keep(self, batch: Any) -> None:
        self._pair = [move_data_to_device(batch, self.module.device)]

    def before_any_batch(self, batch: Any) -> None:
        self._pair = [None] if self.is_per_sample else [self._pair[-1], batch]

    def before_batch(self, batch: Any, batch_idx: int, number: int) -> ProbeResult | None:
        data: Any = self._data(batch)
        if data is None:
            return None
        # what training differentiates is a mean over the batch, of which a row is the B-th part
        rows = batch_size(batch) if self.is_per_sample and self.loss_scale > 1 else 1
        self.measurement.loss_scale = self.loss_scale / rows
        with _SameTensors() if self.is_per_sample else nullcontext():
            whole, levels = self._measure(data, number)
        device = self.module.device
        return whole.over_ranks(device), {i: x.over_ranks(device) for i, x in levels.items()}

    def _measure(self, data: Any, number: int) -> ProbeResult:
        """Measure the whole, and all bins at once or, where that takes more samples, in turn."""
        count, level = len(self.noise_levels), number % len(self.noise_levels)
        measure: Callable[..., Components] = self.measurement.by_differences
        if self.is_per_sample:
            measure = self.measurement.per_sample
            if len(data.x0) >= 2 * count:
                parts = self.measurement.per_sample_by_level(data, count, "level")
                return measure(data, "whole"), dict(enumerate(parts))
        edges = {"low": level / count, "high": (level + 1) / count}
        return measure(data, "whole"), {level: measure(data, "level", **edges)}

    def _data(self, batch: Any) -> Clean | list[Clean] | None:
        """Return the samples to measure on, or two batches, or None if there are not enough."""
        if self.is_per_sample:
            size = self._least(min(self.samples, batch_size(batch)))
            return self._encode(batch, size) if size > 1 else None
        if self._pair[0] is None:
            return None
        pair = [self._encode(one, batch_size(one)) for one in self._pair]
        size = min(len(clean.x0) for clean in pair)
        return [clean.rows(slice(0, size)) for clean in pair]

    def _least(self, size: int) -> int:
        """Return the least of the ranks' sizes: what one leaves out, all must."""
        return least(size, self.module.device)

    def _encode(self, batch: Any, count: int) -> Clean:
        precision = self.trainer.precision_plugin.forward_context
        with preserve_global_rng(), seed_global_rng(self.source("encode")), precision():
            return Clean.from_batch(self.clean(take_rows(batch, 0, count)))


class MicroBatchProbe(GradientProbe):
    """Reads the gradients of micro-batches and ranks off an ordinary run."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        super().__init__(trainer, module)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._norms: list[tuple[int, Tensor]] = []
        self._size = 0
        self._sizes: list[int] = []
        self._handles: list[RemovableHandle] = [
            parameter.register_hook(self._hook(group))  # type: ignore[no-untyped-call]
            for parameter, group in zip(self._parameters, self.groups, strict=True)
        ]

    def before_any_batch(self, batch: Any) -> None:
        self._size = batch_size(batch)

    def before_backward(self) -> None:
        self._sizes.append(self._size)

    def before_optimizer_step(self) -> Components:
        norms, sizes = self._norms, self._sizes or [0]
        self._norms, self._sizes = [], []
        accumulation = int(self.trainer.accumulate_grad_batches)
        squares = (accumulation / self.loss_scale) ** 2 * self._by_group(norms)
        is_even = set(sizes) == {sizes[0]} and len(sizes) == accumulation
        told = torch.tensor([sizes[0], sizes[0] ** 2, is_even], device=squares.device).to(squares)

        everyone = all_reduce_sum(torch.cat([squares, told]))
        squares, (size, squared_size, even) = everyone[:-3], everyone[-3:]
        count, ranks = accumulation * world_size(), world_size()
        means = [  # not clipped yet
            (group, torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
            for parameter, group in zip(self._parameters, self.groups, strict=True)
            if parameter.grad is not None
        ]
        if unscales_itself(self.trainer.optimizers[0]):
            means = [(group, norm / self.loss_scale) for group, norm in means]
        found = two_batch_sizes(squares / count, self._by_group(means), count, sizes[0])
        # the last window of an epoch may be short; its batches do not compare
        counts = (count > 1) & (even == ranks) & (ranks * squared_size == size**2)
        return Components(*(torch.where(counts, x, torch.nan) for x in with_total(found)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, group: int) -> Callable[[Tensor], None]:
        def keep_norm(gradient: Tensor) -> None:
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            self._norms.append((group, norm))

        return keep_norm

    def _by_group(self, norms: list[tuple[int, Tensor]]) -> Tensor:
        """Sum squared norms within groups, in float64, on the device: no step waits for it."""
        device = self.module.device
        sums = torch.zeros(len(self.names), dtype=widest_float(device), device=device)
        if not norms:
            return sums
        index = torch.tensor([group for group, _ in norms], device=sums.device)
        return sums.index_add(0, index, torch.stack([norm for _, norm in norms]).to(sums) ** 2)


class _SameTensors(TorchFunctionMode):
    """Lets ``x.to(...)`` return x where nothing changes, also inside functorch.

    There it returns a wrapper, which diffusers' schedulers, for one, keep as an attribute of
    theirs: it outlives the measurement and can neither be copied nor saved.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is not Tensor.to or (kwargs or {}).get("copy"):
            return found
        is_same = (found.device, found.dtype) == (args[0].device, args[0].dtype)
        return args[0] if is_same else found


def trainable_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that are trained now: callbacks may freeze some."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def with_total(groups: Components) -> Components:
    """Put the sum over all groups first."""
    return Components(*(torch.cat([x.sum(dim=0, keepdim=True), x]) for x in groups))
