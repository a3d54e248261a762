"""Ranks agree on how many batches an epoch has: one that ended early would leave others waiting.

Collectives in a step (gradients, references gathered across ranks) hang if a rank is missing.
Lightning's samplers give all ranks equally many batches; a loader of the user's own may not.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_vr.core.distributed import all_gather_rows, world_size


class _EvenLoader:
    """A loader without a length, which ends on all ranks when it has ended on one."""

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self._device = device

    def __iter__(self) -> Iterator[Any]:
        batches, end = iter(self.loader), object()
        while True:
            batch = next(batches, end)
            has_batch = torch.tensor([batch is not end], dtype=torch.int64, device=self._device)
            everyone = all_gather_rows(has_batch)
            if not bool(everyone.all()):
                if bool(everyone.any()):
                    rank_zero_warn(_message("no more", everyone.tolist()))
                return
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.loader, name)


def equalize_epoch_length(trainer: Trainer) -> None:
    """End epochs where the shortest rank's batches end; all ranks call it when loaders are new."""
    if world_size() == 1:
        return
    loop, device = trainer.fit_loop, trainer.strategy.root_device
    assert loop._combined_loader is not None
    is_stream = any(sized_len(loader) is None for loader in loop._combined_loader.flattened)
    mine = torch.tensor([[float(trainer.num_training_batches), float(is_stream)]], device=device)
    counts, streams = all_gather_rows(mine).T.tolist()
    shortest = min(counts)
    if any(streams):  # which may end before any limit on the batches
        _take_turns(trainer)
    if max(counts) > shortest:
        rank_zero_warn(_message("differently many", counts))
        loop.max_batches = int(shortest)
        interval = trainer.val_check_interval
        if isinstance(interval, float):
            trainer.val_check_batch = max(1, int(shortest * interval))


def _take_turns(trainer: Trainer) -> None:
    loop = trainer.fit_loop
    combined, fetcher = loop._combined_loader, loop._data_fetcher
    assert combined is not None
    assert fetcher is not None
    device = trainer.strategy.root_device
    combined.flattened = [_EvenLoader(loader, device) for loader in combined.flattened]
    fetcher.setup(combined)
    iter(fetcher)


def _message(how: str, counts: list[float]) -> str:
    return (
        f"The training loaders of the ranks have {how} batches ({counts}): the epoch ends with "
        f"the shortest. Give all ranks as many, for example with drop_last=True."
    )
