"""What ``sample`` is called with, checked before the network runs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_vr.core.devices import device_of
from lightning_vr.core.keyed_module import KeyedModule
from lightning_vr.core.validation import check_integer, check_labels


def size(count: int, shape: Any, known: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the size of all samples ``(count, *shape)``.

    Args:
        count: Number of samples.
        shape: Shape of one sample that is asked for, or None.
        known: Shape of the training data, or None.

    Raises:
        ValueError: If it is no shape, or has other axes or channels than the data.
    """
    check_integer("count", count, 1)
    found = known if shape is None else shape
    if found is None:
        raise ValueError(
            "`shape` must be given until the model has seen training data, got None: pass the "
            "shape of one sample, for example (1, 8, 8)."
        )
    is_shape = isinstance(found, Sequence) and not isinstance(found, str) and len(found) > 0
    if not is_shape or not all(_is_whole(size) and size > 0 for size in found):
        raise ValueError(
            f"`shape` must be the positive sizes of one sample, got {found!r}: pass a tuple, for "
            f"example (1, 8, 8)."
        )
    # a network may take pictures of several sizes, but no other channels
    if known is not None and (len(found) != len(known) or found[0] != known[0]):
        raise ValueError(
            f"`shape` must be like the training data's, {known}, got {tuple(found)}: leave it out, "
            f"or give it {len(known)} axes, the first of size {known[0]}."
        )
    return (count, *found)


def labels(
    group: Any, count: int, num_classes: int | None, label_dropout: float, device: torch.device
) -> Tensor | None:
    """Return class labels ``(count,)``, int64 on the device, or None for samples without a class.

    Raises:
        ValueError: If they are no classes of the model, or are missing where the network knows
            no sample without a class.
    """
    if group is None:
        if num_classes is not None and label_dropout == 0:
            raise ValueError(
                f"`group` must be given, as labels are never dropped in training "
                f"(`label_dropout` is 0), got None: give {count} labels in [0, {num_classes}), or "
                f"train with a `label_dropout` of 0.1."
            )
        return None
    if num_classes is None:
        raise ValueError(
            "`group` must be None without classes, got labels: set `num_classes`, or leave it out."
        )
    try:
        found = torch.as_tensor(group)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`group` must be {count} integers in [0, {num_classes}), got "
            f"{type(group).__name__}: give a list or a tensor of them."
        ) from error
    if found.dtype == torch.bool:
        raise ValueError(
            f"`group` must be integers in [0, {num_classes}), got true and false: give numbers."
        )
    check_labels("group", found, num_classes, count)
    return found.to(device, torch.int64)


def source(
    model: KeyedModule, given: torch.Generator | None, seed: int | None, calls: int
) -> torch.Generator:
    """Return the generator of the noise.

    Args:
        model: The model, whose run's seed counts without another one.
        given: The generator that is asked for, or None.
        seed: The seed that is asked for, or None.
        calls: Number of calls so far that asked for neither; each draws other samples.

    Raises:
        ValueError: If the generator cannot draw on the model's device, or both are given.
    """
    if given is not None:
        if seed is not None:
            raise ValueError(
                f"`seed` must be None where `source` is given, got {seed}: leave one of them out."
            )
        check_source(given, device_of(model))
        return given
    if seed is not None:
        check_integer("seed", seed, 0)
        return model.generator("sample", seed=seed)
    return model.generator("sample", *([calls] if calls else []))


def check_source(source: Any, device: torch.device) -> None:
    """Raise if a value is no generator that draws on a device.

    Raises:
        ValueError: If it is something else, or on another kind of device.
    """
    if not isinstance(source, torch.Generator):
        raise ValueError(
            f"`source` must be a torch.Generator, got {type(source).__name__}: use one, as "
            f"torch.Generator().manual_seed(0) or `model.generator('train', step)`."
        )
    if source.device.type != device.type:
        raise ValueError(
            f"`source` must be on the model's device, {device}, got one on {source.device}: make "
            f"it with torch.Generator({str(device)!r})."
        )


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
