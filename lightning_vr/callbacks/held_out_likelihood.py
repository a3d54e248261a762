"""Bits per dimension of held-out data, over all ranks.

The samples are put into blocks that do not depend on the number of ranks, because the step sizes of
the solver are those of a whole block, and the randomness is keyed by the block.
"""

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_vr.callbacks.feature_sets import in_order
from lightning_vr.core.devices import dtype_of
from lightning_vr.core.distributed import gather_objects, rank, world_size
from lightning_vr.core.progress import progress_bar
from lightning_vr.core.rng import generator
from lightning_vr.core.rows import Rows, concatenated, in_chunks, mapped, tensors
from lightning_vr.lifecycle.training_set import held_out_loader, loader_batches
from lightning_vr.process.likelihood import Likelihood
from lightning_vr.process.sampling import evaluating
from lightning_vr.training.module import DiffusionModule

_BLOCK = 64
"""Samples whose ODE is solved at a time."""


def held_out_bits(
    trainer: Trainer, module: DiffusionModule, likelihood: Likelihood, samples: int
) -> Tensor:
    """Return the bits per dimension of encoded held-out samples, on all ranks ``(n,)``.

    Args:
        trainer: The trainer.
        module: Its module; samples are conditioned on their classes and conditions.
        likelihood: How they are computed.
        samples: At most so many samples, evenly spaced.
    """
    rows = _held_out(trainer, module, samples)
    blocks = list(enumerate(in_chunks(rows, _BLOCK)))[rank() :: world_size()]
    device = module.device
    values = [torch.empty(0, dtype=torch.float64, device=device)]
    positions = [torch.empty(0, dtype=torch.int64)]
    is_shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    for i, block in progress_bar(blocks, "Likelihood", is_shown=is_shown):
        block = mapped(block, lambda x: x.to(device))
        source = generator(module.run_seed, "likelihood", i, device=device)
        # without autocast, whose rounding would keep the solver from ever ending
        with evaluating(module):
            bits = likelihood.bits_per_dimension(
                module.denoise,
                module.schedule,
                block["x0"],
                source,
                group=block.get("group"),
                cond=block.get("cond"),
            )
        values.append(bits.double())
        positions.append(i * _BLOCK + torch.arange(len(bits)))
    return in_order(torch.cat(values), torch.cat(positions))


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
    return mapped(found, lambda x: x[order])
