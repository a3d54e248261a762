"""The output of a teacher's network at draws, with and without a condition by one call of it.

What guidance leads away from stands beside each part of a condition under ``negative_`` and its
name: it goes with the condition into repeated draws and chunks, as a prompt's negative one may
differ from sample to sample.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_vr.core.conditions import Condition
from lightning_vr.core.rows import concatenated, mapped
from lightning_vr.core.types import UNLABELLED, Noised
from lightning_vr.training.diffusion import Diffusion

NEGATIVE = "negative_"


def guided_output(model: Diffusion, x: Tensor, noised: Noised, guidance: float) -> Tensor:
    """Return the network's output ``(n, *)``, guided, in float32 or better.

    Args:
        model: The model.
        x: Samples ``(n, *)``, scaled as its prediction type requires.
        noised: Their draws.
        guidance: Scale of classifier-free guidance; 1 is none.

    Raises:
        ValueError: If guidance has nothing to lead away from.
    """
    kind = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(kind):  # where it is off, a context costs more than to ask
        with torch.autocast(kind, enabled=False):
            return guided_output(model, x, noised, guidance)
    group = noised.group if model.num_classes else None
    cond, negative = split_negative(noised.cond)
    if guidance == 1:
        return model.predict(x, replace(noised, group=group, cond=cond)).to(x.dtype)
    if group is None and cond is None:
        raise ValueError(
            f"`guidance` must be 1 for draws without labels and without a condition, got "
            f"{guidance:g}: give `group` or `cond`, or use guidance 1."
        )
    if group is not None:
        group = torch.cat([torch.full_like(group, UNLABELLED), group])
    if cond is not None:
        cond = concatenated([negative or _null(model, cond, len(x), guidance), cond])
    both = _output(model, torch.cat([x, x]), noised, group, cond).to(x.dtype)
    unconditional, conditional = both.chunk(2)
    return torch.lerp(unconditional, conditional, guidance)


def split_negative(cond: Condition | None) -> tuple[Condition | None, Condition | None]:
    """Return a condition without its negative parts, and those under the names of the others.

    Raises:
        ValueError: If some names have a negative part and others have none.
    """
    if cond is None:
        return None, None
    negative = {
        name.removeprefix(NEGATIVE): x for name, x in cond.items() if name.startswith(NEGATIVE)
    }
    own = {name: x for name, x in cond.items() if not name.startswith(NEGATIVE)}
    if negative and negative.keys() != own.keys():
        raise ValueError(
            f"`cond` must hold a negative part for all of its names or for none, got "
            f"{sorted(cond)}: name each of them with {NEGATIVE!r} before it."
        )
    return own, negative or None


def _output(
    model: Diffusion, x: Tensor, noised: Noised, group: Tensor | None, cond: Condition | None
) -> Tensor:
    """Return the output for the draws under one condition and, after it, under another."""
    if not model.overrides_predict():
        return model.call_network(x, torch.cat([noised.t, noised.t]), group, cond).mean
    names = ("xt", "x0", "noise", "t", "alpha", "sigma", "weight")
    both = {name: torch.cat([getattr(noised, name)] * 2) for name in names}
    return model.predict(x, Noised(**both, group=group, cond=cond))


def _null(model: Diffusion, cond: Condition, count: int, guidance: float) -> Condition:
    """Return what stands for no condition, with a row for each of ``count`` draws."""
    if not model.has_null_cond:
        name = next(iter(cond))
        raise ValueError(
            f"`cond` must hold {NEGATIVE + name!r} beside {name!r} with guidance {guidance:g}, "
            f"got {sorted(cond)}: give the embedding of an empty or a negative prompt, or a "
            f"`null_cond` of the teacher."
        )
    null = model.null_condition(cond)
    assert null is not None
    return mapped(null, lambda x: x.expand(count, *x.shape[1:]))
