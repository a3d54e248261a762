"""Sums behind the numbers that are logged once for an epoch, carried over a resume within it.

``self.log(..., on_epoch=True)`` adds up over an epoch, and Lightning starts from nothing when it
resumes: the mean of an epoch would be that of its rest.

Private attributes of Lightning's results are as seen in version 2.6.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

Sums = dict[str, dict[str, Any]]
"""By Lightning's key of a number: the ``name`` that callbacks know it by, the one that it is
``logged`` by for an epoch, the ``value`` and, for a mean, its ``count``."""


class EpochSums:
    """Keeps the sums over the training batches of an epoch."""

    def __init__(self) -> None:
        self._due: Sums = {}
        self._at_batch: Sums = {}
        self._at_end: Sums | None = None

    def load(self, sums: Sums) -> None:
        """Take the sums of a checkpoint, and say which it does not hold."""
        self._due = {key: each for key, each in sums.items() if each["value"] is not None}
        self._at_batch, self._at_end = {}, None
        lost = [f"`{each['name']}`" for each in sums.values() if each["value"] is None]
        if lost:
            rank_zero_warn(
                f"The checkpoint is from the middle of an epoch and does not hold the sums of the "
                f"metrics {', '.join(lost)}, whose values for this epoch will be those of its "
                f"rest: make their states persistent, or log numbers."
            )

    def begin_batch(self, trainer: Trainer) -> None:
        """Note the sums before a batch, which an error may undo."""
        self._at_batch, self._at_end = self._read(trainer), None

    def end_batch(self, trainer: Trainer) -> None:
        """Add the checkpoint's sums to numbers that were logged since."""
        results: Any = trainer.fit_loop.epoch_loop._results
        for key in self._due.keys() & results.keys():
            both = _added(self._due.pop(key), results[key])
            results[key].value = both["value"]
            if both["count"] is not None:
                results[key].cumulated_batch_size = both["count"]

    def end_epoch(self, module: LightningModule) -> None:
        """Note the sums, and log those for which no batch has logged since the resume."""
        self._at_end = self._read(module.trainer)
        if not module.trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            return  # the run ends within the epoch
        for sums in self._due.values():
            value = sums["value"] if sums["count"] is None else sums["value"] / sums["count"]
            value = value.to(module.device)
            module.log(sums["logged"], value)
            module.trainer._logger_connector._callback_metrics[sums["name"]] = value
        self._due = {}

    def state(self, trainer: Trainer, *, is_taken_again: bool, is_cut: bool) -> Sums:
        """Return the sums for a checkpoint within an epoch.

        Args:
            trainer: The trainer.
            is_taken_again: Whether the last batch has not ended.
            is_cut: Whether the run has ended within the epoch.
        """
        if is_taken_again:
            found = self._at_batch
        else:
            found = self._at_end if is_cut and self._at_end is not None else self._read(trainer)
        return {key: {n: _on_cpu(x) for n, x in each.items()} for key, each in found.items()}

    def _read(self, trainer: Trainer) -> Sums:
        found = dict(self._due)
        results: Any = trainer.fit_loop.epoch_loop._results
        for key, result in results.items():
            meta = result.meta
            if not meta.on_epoch or result.has_reset or meta.fx == "on_train_epoch_end":
                continue
            if result.is_tensor:
                found[key] = _added(self._due.get(key), result)
            elif not any(result.value._persistent.values()):
                found[key] = {"name": meta.name, "value": None}
        return found


def _added(sums: dict[str, Any] | None, result: Any) -> dict[str, Any]:
    """Return the sums of one number with what was logged since."""
    meta, value = result.meta, result.value
    count = result.cumulated_batch_size if meta.is_mean_reduction else None
    if sums is not None:
        before = sums["value"].to(value)
        if meta.is_max_reduction or meta.is_min_reduction:
            value = meta.reduce_fx(torch.stack([before, value]))
        else:
            value = before + value
        count = None if count is None else sums["count"].to(count) + count
    names = {"name": meta.name, "logged": meta.forked_name(on_step=False)}
    return names | {"value": value, "count": count}


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
