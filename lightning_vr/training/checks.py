"""What a DiffusionModule refuses when it is built: parts that do not go together."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_vr.core.types import Clean
from lightning_vr.estimators.draws import Draws
from lightning_vr.estimators.loss import ControlVariate
from lightning_vr.estimators.targets import Target
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.posterior.references import check_samples
from lightning_vr.process.objective import Objective


def check_labels(num_classes: int | None, label_dropout: float) -> None:
    """Refuse a number of classes or a label dropout that means nothing."""
    if num_classes is not None and num_classes < 1:
        raise ValueError(
            f"Argument `num_classes` expected to be at least 1, but got {num_classes}."
        )
    if not 0 <= label_dropout <= 1:
        raise ValueError(
            f"Argument `label_dropout` expected to be between 0 and 1, but got {label_dropout}."
        )
    if label_dropout > 0 and num_classes is None:
        raise ValueError(
            f"Argument `label_dropout` of {label_dropout} needs labels to drop: set `num_classes`."
        )


def check_network(network: nn.Module, num_classes: int | None) -> None:
    """Refuse a network that divides its output by the time, or lacks a class embedding."""
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    config = getattr(network, "config", None)
    settings = config if isinstance(config, Mapping) else vars(network)
    embeddings = settings.get("num_class_embeds")
    counts = "num_class_embeds" in settings and settings.get("class_embed_type") is None
    if num_classes is not None and counts and (embeddings or 0) <= num_classes:
        raise ValueError(
            f"Argument `network`: {type(network).__name__} has num_class_embeds={embeddings}, but "
            f"{num_classes} classes and the dropped label need {num_classes + 1}: set "
            f"num_class_embeds to {num_classes + 1}."
        )
    if settings.get("time_embedding_type") == "fourier":
        raise ValueError(
            f"Argument `network`: {type(network).__name__} with time_embedding_type='fourier' "
            f"divides its output by the time and takes its logarithm: use 'positional'."
        )


def check_call(network: nn.Module, num_classes: int | None, *, may_condition: bool) -> None:
    """Refuse a network that cannot be called as a module does that does not override ``predict``.

    Args:
        network: The network.
        num_classes: Number of classes of the module, or None.
        may_condition: Whether the module's own ``encode`` may give the labels as a condition.

    Raises:
        ValueError: If it takes other arguments, or labels that it will not get.
    """
    name = type(network).__name__
    labels = {} if num_classes is None else {"class_labels": None}
    try:
        # what it asks for besides may come as a condition
        inspect.signature(network.forward).bind_partial(None, None, **labels)
    except TypeError as error:
        raise ValueError(
            f"Argument `network` is called as {name}(x, t{', class_labels=...' * len(labels)}), "
            f"but cannot be ({error}): use a network of that signature, or override `predict`."
        ) from error
    config = getattr(network, "config", None)
    embeddings = config.get("num_class_embeds") if isinstance(config, Mapping) else None
    if embeddings and not labels and not may_condition:
        raise ValueError(
            f"Argument `num_classes` expected to be given, as {name} has "
            f"num_class_embeds={embeddings}, but got None: set `num_classes` to {embeddings - 1}."
        )


def check_times(objective: Objective) -> None:
    """Refuse a density of times at which the schedule is none.

    Raises:
        ValueError: Naming the first of such times.
    """
    schedule, timesteps = objective.schedule, objective.timesteps
    times = timesteps(torch.linspace(1e-3, 1 - 1e-3, 101, dtype=torch.float64))
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    is_valid = (alpha > 0) & (sigma > 0) & torch.isfinite(sigma / alpha)
    if not bool(is_valid.all()):
        wrong = float(times[~is_valid][0])
        raise ValueError(
            f"Argument `timesteps` expected to draw times of the {type(schedule).__name__} "
            f"schedule, from {schedule.t_min:g} to {schedule.t_max:g}, but "
            f"{type(timesteps).__name__} draws {wrong:.3g}: leave it out, or use "
            f"Uniform({schedule.t_min:g}, {schedule.t_max:g})."
        )


def check_guidance(guidance: float, num_classes: int | None) -> None:
    """Refuse guidance without classes to guide to."""
    if guidance != 1 and num_classes is None:
        raise ValueError(
            f"Argument `guidance` of {guidance:g} needs classes: set `num_classes` and "
            f"`label_dropout`, or use guidance 1."
        )


def check_draws(draws: Draws, objective: Objective, network: nn.Module) -> None:
    """Refuse draws that do not estimate the objective, or not with this network.

    Raises:
        ValueError: If a proposal misses part of the loss, or several draws of each sample meet
            what changes or couples single draws.
    """
    draws.check(objective)
    if draws.draws_per_sample == 1 and getattr(draws, "resamples", 1) != "auto":
        return
    found = _batch_normalisation(network)
    if found:
        raise ValueError(
            f"Argument `resamples` expected to be 1 with batch normalisation, which couples "
            f"the draws of a sample, but the network's {found}: "
            f"use group normalisation, or one draw of each sample."
        )
    if any(hasattr(parameter, "grad_sample") for parameter in network.parameters()):
        raise ValueError(
            f"Argument `resamples` expected to be 1 where gradients are clipped draw by draw, as "
            f"{type(network).__name__} is prepared for: the mean of clipped draws depends on how "
            f"many there are. Clip the gradient of the whole step, or use one draw of each sample."
        )


def check_control_variate(control: ControlVariate | None, network: nn.Module) -> None:
    """Refuse a control variate whose points would share a batch's statistics with the draws."""
    found = _batch_normalisation(network)
    if isinstance(control, TaylorCV) and found:
        raise ValueError(
            f"Argument `control_variate` expected to be None with batch normalisation, which would "
            f"take clean samples for draws, but the network's {found}: use group normalisation."
        )


def _batch_normalisation(network: nn.Module) -> str:
    """Return what normalises over the batch, by name and class, or nothing."""
    found = ((n, m) for n, m in network.named_modules() if isinstance(m, _BatchNorm))
    return next((f"`{name}` is a {type(module).__name__}" for name, module in found), "")


def check_clean(
    clean: Clean,
    num_classes: int | None,
    positions: Tensor | None = None,
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Refuse samples, labels or indices that training would go wrong with.

    Args:
        clean: Encoded samples.
        num_classes: Number of classes of the module, or None.
        positions: Where the samples stand in the training set ``(B,)``, if that is known.
        allow_nonfinite: Whether samples that are not finite are dealt with elsewhere.

    Raises:
        ValueError: Naming the first sample that is not as it must be.
    """
    check_samples("x0", clean.x0)
    finite = torch.isfinite(clean.x0.flatten(1)).all(dim=1).cpu()
    if not (allow_nonfinite or bool(finite.all())):
        row = int((~finite).nonzero()[0])
        known = clean.index if positions is None else positions
        name = f"row {row} of the batch" if known is None else f"sample {int(known[row])}"
        raise ValueError(
            f"The clean samples expected to be finite, but {name} is not: "
            f"remove it from the data or mend `encode`."
        )
    if clean.group is not None:
        check_group(clean.group, num_classes)
    if clean.cond_group is not None:
        _check_cond_group(clean.cond_group, len(clean.x0))
    if positions is None or clean.index is None:
        return
    if not torch.equal(clean.index.cpu(), positions):
        raise ValueError(
            f"Sample indices expected to be positions in the training set, but sample "
            f"{int(positions[0])} has index {int(clean.index[0])}: let the data set's item i "
            f"carry the index i."
        )


def check_group(group: Tensor, num_classes: int | None) -> None:
    """Refuse labels that are no int64 classes in ``[0, num_classes)``."""
    if num_classes is None:
        raise ValueError(
            "Argument `group` needs a class-conditional module: set `num_classes`, or leave it out."
        )
    if group.ndim != 1 or group.is_floating_point():
        raise ValueError(
            f"Class labels expected to be integers of shape (B,), but got {group.dtype} of shape "
            f"{tuple(group.shape)}."
        )
    if len(group) and not 0 <= int(group.min()) <= int(group.max()) < num_classes:
        worst = int(group.min()) if int(group.min()) < 0 else int(group.max())
        raise ValueError(
            f"Class labels expected to be in [0, {num_classes}), as `num_classes` says, "
            f"but got {worst}: set `num_classes` to {worst + 1} or mend the labels."
        )


def _check_cond_group(cond_group: Tensor, count: int) -> None:
    if cond_group.shape != (count,) or cond_group.is_floating_point():
        raise ValueError(
            f"Argument `cond_group` expected to be integers of shape ({count},), one for each "
            f"sample, but got {cond_group.dtype} of shape {tuple(cond_group.shape)}: number the "
            f"different conditions."
        )
    if count and int(cond_group.min()) < 0:
        raise ValueError(
            f"Argument `cond_group` expected to be 0 or more, but got {int(cond_group.min())}: "
            f"give every condition a number, also that of no augmentation."
        )


def check_upstream(clean: Clean, target: Target) -> None:
    """Refuse a target whose references an upstream in training would move away from."""
    if clean.x0.requires_grad and (target.bank_size != 0 or target.couples_rows):
        raise ValueError(
            f"Argument `target`: {type(target).__name__} takes its references as they are, but "
            f"`encode` is trained and moves them: use DSM(), or detach x0 in `encode` and train "
            f"what makes `cond`."
        )
