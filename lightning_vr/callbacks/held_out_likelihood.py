"""Bits per dimension of held-out data, over all ranks: by an ODE, or bounded step by step.

The samples are put into blocks that do not depend on the number of ranks, because the step sizes of
the solver are those of a whole block, and the randomness is keyed by the block.
"""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any, NamedTuple, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_vr.callbacks.evaluation_table import Measurement, standard_error
from lightning_vr.callbacks.feature_sets import in_order
from lightning_vr.core.devices import dtype_of, timed, widest_float
from lightning_vr.core.distributed import gather_objects, rank, world_size
from lightning_vr.core.progress import progress_bar
from lightning_vr.core.rng import generator
from lightning_vr.core.rows import Rows, concatenated, in_chunks, mapped, rows_at, tensors
from lightning_vr.lifecycle.training_set import held_out_loader, loader_batches
from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.likelihood import Likelihood
from lightning_vr.process.reverse_steps import Variance
from lightning_vr.process.sampling import evaluating
from lightning_vr.process.variational_bound import VariationalBound
from lightning_vr.training.module import DiffusionModule

_BLOCK = 64
"""Samples whose ODE is solved at a time."""

_BOUND_STEPS = 100
"""Steps of the bound where none are given: each is a call of the network for each sample."""


class HeldOut(NamedTuple):
    """Numbers of held-out samples.

    Attributes:
        values: One number or more for each sample ``(n, k)``, float64, on all ranks.
        evaluations: Calls of the network for each sample, the most of all blocks.
    """

    values: Tensor
    evaluations: int


def likelihood_rows(
    trainer: Trainer, module: DiffusionModule, likelihood: Likelihood, samples: int
) -> list[Measurement]:
    """Return the row of the bits per dimension of encoded held-out samples.

    Args:
        trainer: The trainer.
        module: Its module; samples are conditioned on their classes and conditions.
        likelihood: How they are computed.
        samples: At most so many samples, evenly spaced.
    """

    def bits(block: Rows, source: torch.Generator, denoise: Any) -> Tensor:
        x0, given = block["x0"], _asked(block)
        found = likelihood.bits_per_dimension(denoise, module.schedule, x0, source, **given)
        return found[:, None]

    def measure() -> HeldOut:
        return _in_blocks(trainer, module, samples, "likelihood", 1, module.denoise, bits)

    return _rows("bits_per_dimension", measure, [vars(likelihood)], module.device)


def bound_rows(
    trainer: Trainer, module: DiffusionModule, bound: VariationalBound | None, samples: int
) -> list[Measurement]:
    """Return a row of the variational bound for each variance of the reverse steps.

    Args:
        trainer: The trainer.
        module: Its module; samples are conditioned on their classes and conditions.
        bound: How it is computed; over at most 100 timesteps if None.
        samples: At most so many held-out samples, evenly spaced.
    """
    how, is_learned = bound or _usual_bound(module), module.variance is not None
    kinds = [kind for kind in get_args(Variance) if is_learned or kind != "learned"]

    def bits(block: Rows, source: torch.Generator, estimate: Any) -> Tensor:
        asked = {"variances": kinds, **_asked(block)}
        found = how.bits_per_dimension(estimate, module.schedule, block["x0"], source, **asked)
        return torch.stack([found[kind] for kind in kinds], dim=1)

    def measure() -> HeldOut:
        estimate = module.reverse_estimate
        return _in_blocks(trainer, module, samples, "bound", len(kinds), estimate, bits)

    settings = [{"variance": kind, **vars(how)} for kind in kinds]
    return _rows("variational_bound", measure, settings, module.device)


def _usual_bound(module: DiffusionModule) -> VariationalBound:
    levels = None if module.variance is None else module.variance.levels
    assert isinstance(module.schedule, DiffusersSchedule), "others have no variational bound"
    return VariationalBound(min(_BOUND_STEPS, module.schedule.steps), levels)


def _asked(block: Rows) -> dict[str, Any]:
    return {name: block.get(name) for name in ("group", "cond")}


def _rows(
    name: str,
    measure: Callable[[], HeldOut],
    settings: Sequence[dict[str, Any]],
    device: torch.device,
) -> list[Measurement]:
    """Return a row for each number of a sample, with the settings that it depends on."""
    found, seconds = timed(measure, device)
    rows = []
    for values, given in zip(found.values.T.tolist(), settings, strict=True):
        about = {key: value for key, value in given.items() if value is not None}
        cost = (seconds, found.evaluations)
        error = standard_error(values)
        rows.append(Measurement(name, mean(values), error, len(values), 1, about, *cost))
    return rows


def _in_blocks(
    trainer: Trainer,
    module: DiffusionModule,
    samples: int,
    key: str,
    width: int,
    estimate: Callable[..., Any],
    measure: Callable[[Rows, torch.Generator, Any], Tensor],
) -> HeldOut:
    """Return what is measured of each block of held-out samples, in the data set's order."""
    rows = _held_out(trainer, module, samples)
    blocks = list(enumerate(in_chunks(rows, _BLOCK)))[rank() :: world_size()]
    device = module.device
    values = [torch.empty(0, width, dtype=widest_float(device), device=device)]
    positions, calls = [torch.empty(0, dtype=torch.int64)], [0]
    is_shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    for i, block in progress_bar(blocks, key.capitalize(), is_shown=is_shown):
        block = mapped(block, lambda x: x.to(device))
        source = generator(module.run_seed, key, i, device=device)
        counted = _Counted(estimate)
        # without autocast, whose rounding would keep the solver from ever ending
        with evaluating(module):
            found = measure(block, source, counted)
        values.append(found.to(values[0].dtype))
        positions.append(i * _BLOCK + torch.arange(len(found)))
        calls.append(counted.calls)
    ordered = in_order(torch.cat(values), torch.cat(positions))
    return HeldOut(ordered, max(gather_objects(max(calls))))


class _Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._function(*args, **kwargs)


def check_precision(module: DiffusionModule) -> None:
    """Raise if the network's weights are too coarse for an adaptive solver.

    Raises:
        MisconfigurationException: With their dtype.
    """
    dtype = dtype_of(module.network)
    if dtype in (torch.float16, torch.bfloat16):
        raise MisconfigurationException(
            f"`precision` must keep the network in float32 for 'bits_per_dimension', whose solver "
            f"needs smooth outputs, got {dtype}: use 32-true or a mixed precision, or leave that "
            f"measure out of `measures` of `Evaluation`."
        )


@torch.no_grad()
def _held_out(trainer: Trainer, module: DiffusionModule, samples: int) -> Rows:
    """Return encoded samples of all ranks in the data set's order, on the CPU."""
    parts: list[Rows] = []
    loader = held_out_loader(trainer)
    title = "Reading held-out data"
    for at, batch in loader_batches(trainer, loader, title, samples, key="likelihood"):
        with trainer.precision_plugin.forward_context():
            rows = tensors(module.clean(batch))
        kept: Rows = {name: rows[name] for name in ("x0", "group", "cond") if name in rows}
        parts.append(mapped(kept | {"at": at}, lambda x: x.cpu()))
    found = concatenated([part for of_rank in gather_objects(parts) for part in of_rank])
    order = found["at"].argsort()
    return rows_at(found, order)
