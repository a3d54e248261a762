"""What is checked when a model is built, that its parts go together, and of each kind of batch."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_vr.core.devices import without_compiler
from lightning_vr.core.types import Clean
from lightning_vr.core.validation import check_at_least, check_labels, check_samples
from lightning_vr.estimators.draws import Draws
from lightning_vr.estimators.learned_variance import LearnedVariance
from lightning_vr.estimators.loss import ControlVariate
from lightning_vr.estimators.targets import Target
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.process.calling_conventions import NetworkCall, configuration
from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.objective import Objective
from lightning_vr.training.denoising import Denoising

_LARGEST_PIXEL = 8.0
"""Above what latents of unit variance and standardised pixels reach."""


def check_conditioning(network: nn.Module, num_classes: int | None, label_dropout: float) -> None:
    """Raise if classes, label dropout and embeddings do not fit together."""
    if num_classes is not None:
        check_at_least("num_classes", num_classes, 1)
    if not 0 <= label_dropout <= 1:
        raise ValueError(
            f"`label_dropout` must be between 0 and 1, got {label_dropout}: use 0.1, or 0 for none."
        )
    if label_dropout > 0 and num_classes is None:
        raise ValueError(
            f"`label_dropout` must be 0 without classes, got {label_dropout}: set `num_classes`."
        )
    network = without_compiler(network)
    if num_classes is not None:
        _check_embeddings(network, num_classes)
    if _settings(network).get("time_embedding_type") == "fourier":
        raise ValueError(
            f"`network` must take times as they are, got a {type(network).__name__} with "
            f"time_embedding_type='fourier', which takes their logarithm and divides its output "
            f"by them: use 'positional'."
        )


def check_call(network: nn.Module, num_classes: int | None, *, may_condition: bool) -> None:
    """Raise if a network cannot be called as a model without its own ``predict`` calls it.

    What else it needs may come with each batch, and is checked there.

    Args:
        network: The network.
        num_classes: Number of classes of the model, or None.
        may_condition: Whether the model's own ``encode`` may give the labels as a condition.

    Raises:
        ValueError: If it takes other arguments, or labels that it will not get.
    """
    call = NetworkCall.of(network)
    if num_classes is not None and not call.accepts("class_labels"):
        raise ValueError(
            f"`network` must take the call {call.name}(x, t, class_labels=...), got one that takes "
            f"({', '.join(call.takes or ())}): use a network of that signature, leave out "
            f"`num_classes`, or override `predict`."
        )
    if num_classes is None and "class_labels" in call.needs and not may_condition:
        name, embeddings = _embeddings(without_compiler(network))
        reason = f"has {name}={embeddings}" if embeddings else "cannot be called without labels"
        own = f" to {embeddings - (name == 'num_class_embeds')}" if embeddings else ""
        raise ValueError(
            f"`num_classes` must be given, as {call.name} {reason}, got None: set `num_classes`"
            f"{own}."
        )


def check_objective(objective: Objective) -> None:
    """Raise if the schedule does not go with the prediction, or with the density of t.

    Raises:
        ValueError: If networks of the schedule predict something else, or naming the first time
            that is drawn and at which the schedule is not defined.
    """
    schedule, timesteps = objective.schedule, objective.timesteps
    schedule.check_prediction(objective.prediction)
    times = timesteps(torch.linspace(1e-3, 1 - 1e-3, 101, dtype=torch.float64))
    if isinstance(schedule, DiffusersSchedule) and bool((times <= 1).all()) and schedule.t_max > 1:
        raise ValueError(
            f"`timesteps` must draw times of the scheduler, from {schedule.t_min:g} to "
            f"{schedule.t_max:g}, got {type(timesteps).__name__}, which draws none above 1: leave "
            f"it out, or use Shifted({type(timesteps).__name__}(...), end={schedule.steps})."
        )
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    is_valid = (alpha > 0) & (sigma > 0) & torch.isfinite(sigma / alpha)
    if not bool(is_valid.all()):
        wrong = float(times[~is_valid][0])
        raise ValueError(
            f"`timesteps` must draw times of the {type(schedule).__name__} schedule, from "
            f"{schedule.t_min:g} to {schedule.t_max:g}, got {type(timesteps).__name__}, which "
            f"draws {wrong:.3g}: leave it out, or use "
            f"Uniform({schedule.t_min:g}, {schedule.t_max:g})."
        )


def check_estimators(
    draws: Draws,
    control: ControlVariate | None,
    objective: Objective,
    network: nn.Module,
    variance: LearnedVariance | None = None,
) -> None:
    """Raise if the parts of the loss do not go together, or not with this network.

    Raises:
        ValueError: If a proposal misses part of the loss, if the variance cannot be learned, or if
            the network couples or changes single draws where these must be independent.
    """
    draws.check(objective)
    _check_variance(variance, draws, control, objective, network)
    normalisation = _batch_normalisation(network)
    if isinstance(control, TaylorCV) and normalisation:
        raise ValueError(
            f"`control_variate` must be None with batch normalisation, which would mix its clean "
            f"points with the draws, but the network's {normalisation}: use group normalisation."
        )
    if draws.draws_per_sample == 1 and getattr(draws, "resamples", 1) != "auto":
        return
    if normalisation:
        raise ValueError(
            f"`resamples` must be 1 with batch normalisation, which couples the draws of a sample, "
            f"but the network's {normalisation}: use group normalisation, or one draw of each "
            f"sample."
        )
    if any(hasattr(parameter, "grad_sample") for parameter in network.parameters()):
        raise ValueError(
            f"`resamples` must be 1 where gradients are clipped draw by draw, as "
            f"{type(network).__name__} is prepared for: the mean of clipped draws depends on how "
            f"many there are. Clip the gradient of the whole step, or use one draw of each sample."
        )


def _check_variance(
    variance: LearnedVariance | None,
    draws: Draws,
    control: ControlVariate | None,
    objective: Objective,
    network: nn.Module,
) -> None:
    """Raise if a learned variance does not go with the rest, or is missing where it is needed."""
    if variance is not None:
        variance.check(objective, draws, without_compiler(network))
    if variance is not None and control is not None:
        raise ValueError(
            f"`control_variate` must be None with `variance`, got {type(control).__name__}: its "
            f"calls of the network leave out what that says about the variance."
        )
    proposal = getattr(draws, "proposal", None)
    if variance is None and getattr(proposal, "moment", None) == "bound":
        raise ValueError(
            "`moment` must be 'gradient' or 'loss' without `variance`, whose term of the loss "
            "'bound' is of, got 'bound': use another, or LearnedVariance()."
        )


def check_predicts_variance(model: Denoising, variance: LearnedVariance | None) -> None:
    """Raise if a model with a learned variance has a ``predict`` of its own that returns none."""
    if variance is not None and model.overrides_mean_alone():
        name = type(model).__name__
        raise ValueError(
            f"`variance` must be None for a {name} that overrides `predict`, which returns the "
            f"mean alone: override `predict_with_variance` instead."
        )


def check_clean(
    clean: Clean,
    num_classes: int | None,
    positions: Tensor | None = None,
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Raise if encoded samples, labels or indices cannot be trained on.

    Args:
        clean: Encoded samples.
        num_classes: Number of classes of the model, or None.
        positions: Positions of the samples in the training set ``(B,)``, if they are known.
        allow_nonfinite: Whether samples that are not finite are allowed.

    Raises:
        ValueError: Naming the first sample that is wrong.
    """
    check_samples("x0", clean.x0)
    finite = torch.isfinite(clean.x0.flatten(1)).all(dim=1).cpu()
    if not (allow_nonfinite or bool(finite.all())):
        row = int((~finite).nonzero()[0])
        known = clean.index if positions is None else positions
        name = f"row {row} of the batch" if known is None else f"sample {int(known[row])}"
        raise ValueError(
            f"Clean samples must be finite, but {name} is not: remove it from the data or fix "
            f"`encode`."
        )
    _warn_of_range(clean.x0)
    if clean.group is not None:
        check_group(clean.group, num_classes)
    elif num_classes is not None:
        raise ValueError(
            f"Batches must have labels with `num_classes`, which is {num_classes}, got one "
            f"without: let the data set return `label` (ImageFolder: labels_from_folders=True) and "
            f"`encode` pass it on as `group`, or leave out `num_classes`."
        )
    if clean.cond_group is not None:
        _check_cond_group(clean.cond_group, len(clean.x0))
    if positions is None or clean.index is None:
        return
    if not torch.equal(clean.index.cpu(), positions):
        raise ValueError(
            f"Sample indices must be positions in the training set, but sample "
            f"{int(positions[0])} has index {int(clean.index[0])}: let item i of the data set "
            f"carry the index i."
        )


def _warn_of_range(x0: Tensor) -> None:
    """Warn if images are not around 0, or far outside [-1, 1], as pixels from 0 to 255 are."""
    if x0.ndim < 4:
        return
    lowest, highest = (float(end) for end in x0.detach().aminmax())
    largest = max(-lowest, highest)
    if lowest >= 0 and 0.5 < largest <= 1:
        warnings.warn(
            "Images should lie in [-1, 1], but none of these pixels is below 0: scale them, as "
            "`2 * image - 1` for pixels from 0 to 1.",
            stacklevel=2,
        )
    if largest > _LARGEST_PIXEL:
        warnings.warn(
            f"Images should lie in [-1, 1], but these reach {largest:.4g}: scale them, as "
            f"`image / 127.5 - 1` for pixels from 0 to 255, or divide latents by their standard "
            f"deviation.",
            stacklevel=2,
        )


def check_group(group: Tensor, num_classes: int | None) -> None:
    """Raise if labels are not integers in ``[0, num_classes)``."""
    if num_classes is None:
        raise ValueError(
            "`group` must be None without classes, got labels: set `num_classes`, or leave it out."
        )
    check_labels("group", group, num_classes)


def check_upstream(clean: Clean, target: Target) -> None:
    """Raise if ``encode`` is trained, which would move samples away from the references."""
    if clean.x0.requires_grad and (target.bank_size != 0 or target.couples_rows):
        raise ValueError(
            f"`target` must be DSM() if `encode` is trained, which moves the references, got "
            f"{type(target).__name__}: use DSM(), or detach x0 in `encode` and train what makes "
            f"`cond`."
        )


def _check_embeddings(network: nn.Module, num_classes: int) -> None:
    """Raise if a network has no embedding for the classes, or none for the dropped label."""
    name, embeddings = _embeddings(network)
    if name == "num_class_embeds" and (embeddings or 0) <= num_classes:
        raise ValueError(
            f"`network` must embed {num_classes} classes and the dropped label, got a "
            f"{type(network).__name__} with num_class_embeds={embeddings}: set num_class_embeds "
            f"to {num_classes + 1}."
        )
    if name == "num_embeds_ada_norm" and embeddings != num_classes:
        raise ValueError(
            f"`num_classes` must be {embeddings}, the num_embeds_ada_norm of the network, as a "
            f"{type(network).__name__} has the dropped label after its classes, got {num_classes}: "
            f"set one to the other."
        )


def _embeddings(network: nn.Module) -> tuple[str, int | None]:
    """Return which setting says how many labels a network embeds, and how many; "" if none."""
    settings = _settings(network)
    if "num_embeds_ada_norm" in settings:  # of PixArt too, which embeds no labels
        takes_labels = "class_labels" in inspect.signature(network.forward).parameters
        found = "num_embeds_ada_norm", settings["num_embeds_ada_norm"]
        return found if takes_labels else ("", None)
    if "num_class_embeds" in settings and settings.get("class_embed_type") is None:
        return "num_class_embeds", settings["num_class_embeds"]
    return "", None


def _settings(network: nn.Module) -> Mapping[str, Any]:
    """Return the settings of a model of diffusers, the attributes of another network."""
    return configuration(network) or vars(network)


def _check_cond_group(cond_group: Tensor, count: int) -> None:
    if cond_group.shape != (count,) or cond_group.is_floating_point():
        raise ValueError(
            f"`cond_group` must be integers of shape ({count},), one for each sample, got "
            f"{cond_group.dtype} of shape {tuple(cond_group.shape)}: number the conditions."
        )
    if count:
        check_at_least("cond_group", int(cond_group.min()), 0)


def _batch_normalisation(network: nn.Module) -> str:
    """Return the first layer that normalises over the batch, by name and class, or nothing."""
    found = ((n, m) for n, m in network.named_modules() if isinstance(m, _BatchNorm))
    return next((f"`{name}` is a {type(module).__name__}" for name, module in found), "")
