"""What flows through one training step, as frozen bundles of tensors.

``encode`` returns ``Clean``, draws return ``Noised``, targets return ``TargetEstimate`` and the
loss is a ``LossEstimate``. Shapes: ``x`` is ``(B, *)``; ``t``, ``alpha``, ``sigma`` are ``(B,)``.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_vr.core.conditions import Condition, condition_rows, expanded

UNLABELLED = -1
"""The group of a row whose label is dropped or unknown: every reference is exchangeable with it."""


@dataclass(frozen=True)
class Clean:
    """Clean samples, as the upstream ``encode`` returns them.

    Attributes:
        x0: Samples before noise is added, ``(B, *)``.
        group: Class labels ``(B,)``, int64, that the network is conditioned on, or None.
            Samples of one group are exchangeable.
        cond: Any further condition of the network (text, an image), as keyword arguments of the
            network or None: tensors of B rows, or of one row for all, or dictionaries of these.
            Samples with a condition have no exchangeable references, unless ``cond_group`` says
            which share it.
        index: Positions in the training set ``(B,)``, int64, or None.
        cond_group: A number for each condition ``(B,)``, int64, not negative, or None. Samples
            that share it and their class are exchangeable: augmentations that the network is
            conditioned on (Karras et al. 2022, arXiv 2206.00364, appendix F.2), repeated prompts.
    """

    x0: Tensor
    group: Tensor | None = None
    cond: Condition | None = None
    index: Tensor | None = None
    cond_group: Tensor | None = None

    @property
    def labels(self) -> Tensor | None:
        """What exchangeable samples share: classes ``(B,)``, or ``(B, k)`` with ``cond_group``."""
        return _labels(self.group, self.cond_group)

    def rows(self, index: Any) -> "Clean":
        """Return the samples at ``index``, a slice or positions ``(n,)``."""
        group = None if self.group is None else self.group[index]
        own = None if self.index is None else self.index[index]
        cond_group = None if self.cond_group is None else self.cond_group[index]
        return Clean(self.x0[index], group, condition_rows(self.cond, index), own, cond_group)

    def expanded(self) -> "Clean":
        """Return the same with a row of the condition for each sample, if one was for all."""
        if self.cond is None:
            return self
        return replace(self, cond=expanded(self.cond, len(self.x0)))

    def detached(self) -> "Clean":
        """Return ``expanded`` samples without their graph."""
        clean = self.expanded()
        given = clean.group, clean.cond, clean.index, clean.cond_group
        return Clean(clean.x0.detach(), *given)

    def repeated(self, count: int) -> "Clean":
        """Return ``count`` copies of each sample next to each other."""
        if count == 1:
            return self
        index = torch.arange(len(self.x0), device=self.x0.device)
        return self.rows(index.repeat_interleave(count))

    @classmethod
    def from_batch(cls, batch: Any) -> "Clean":
        """Read the usual batches.

        Args:
            batch: A tensor, ``(x,)``, ``(x, label)``, or a dictionary with ``"image"`` or ``"x0"``
                and, if there are any, ``"label"``, ``"index"`` and ``"cond"``, a condition.

        Raises:
            ValueError: If the batch is none of these.
        """
        if isinstance(batch, Clean):
            return batch
        if isinstance(batch, Tensor):
            return cls(batch)
        if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
            return cls(batch[0], group=batch[1] if len(batch) > 1 else None)
        if isinstance(batch, dict) and ("x0" in batch or "image" in batch):
            x0 = batch["x0"] if "x0" in batch else batch["image"]
            return cls(x0, batch.get("label"), batch.get("cond"), batch.get("index"))
        raise ValueError(
            f"The batch must be a tensor, (x, label) or a dictionary with 'image' or 'x0', "
            f"got {_described(batch)}: override `encode` of a "
            f"DiffusionModule to turn it into Clean(x0, ...), or give a callback on another module "
            f"`clean`, a function from a batch to samples."
        )


def _described(batch: Any) -> str:
    if isinstance(batch, dict):
        return f"one with {', '.join(map(repr, batch)) or 'nothing'}"
    return type(batch).__name__


@dataclass(frozen=True)
class Noised:
    """Draws of ``(index, t, noise)``: ``xt = alpha * x0 + sigma * noise``, with importance weights.

    Attributes:
        xt: Noised samples ``(B, *)``.
        x0: The clean samples that made them ``(B, *)``.
        noise: Standard normal noise ``(B, *)``.
        t: Times ``(B,)``.
        alpha: Scale of the sample ``(B,)``.
        sigma: Scale of the noise ``(B,)``.
        weight: Importance weights p/q ``(B,)``, never self-normalised.
        group: Class labels ``(B,)`` as the network sees them, ``UNLABELLED`` where dropped, or
            None.
        cond: Further condition of the network, or None.
        index: Positions in the training set ``(B,)``, or None.
        loss_weight: Product of importance weight and the weight ``λ b²`` on the squared error of
            the network's output ``(B,)``, or None where that is not known as one number.
        probes: Random directions ``(B, m, *)`` that a control variate measures traces along, or
            None.
        cond_group: A number for each condition ``(B,)``, ``UNLABELLED`` where it is dropped, or
            None.
    """

    xt: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    weight: Tensor
    group: Tensor | None = None
    cond: Condition | None = None
    index: Tensor | None = None
    loss_weight: Tensor | None = None
    probes: Tensor | None = None
    cond_group: Tensor | None = None

    @property
    def noise_level(self) -> Tensor:
        """``sigma / alpha``, shape ``(B,)``: the axis that all schedules share."""
        return self.sigma / self.alpha

    @property
    def labels(self) -> Tensor | None:
        """What references must share: classes ``(B,)``, or ``(B, k)`` with ``cond_group``."""
        return _labels(self.group, self.cond_group)


@dataclass(frozen=True)
class TargetEstimate:
    """An estimate of ``E[x0 | xt]``.

    Attributes:
        x0: The estimate ``(B, *)``.
        ess: Effective number of references ``(B,)``; 1 for the sample itself.
        spread: ``tr Cov`` of x0 under the reference weights ``(B,)``, x0 units squared. Its mean
            is the target variance that the estimate removes.
    """

    x0: Tensor
    ess: Tensor
    spread: Tensor


class DrawEstimate(Protocol):
    """What draws learn from and a guard looks at: an estimate in which each draw has its part."""

    @property
    def noised(self) -> Noised:
        """The draws."""

    @property
    def per_draw(self) -> Tensor:
        """Weighted squared error of each draw ``(B,)``."""

    @property
    def control(self) -> Tensor | None:
        """The term of a control variate for each draw ``(B,)``, or None."""

    @property
    def bound(self) -> Tensor | None:
        """The term of a learned variance for each draw ``(B,)``, or None."""


@dataclass(frozen=True)
class LossEstimate:
    """An unbiased estimate of the diffusion loss.

    Attributes:
        loss: Scalar to differentiate: the mean of ``per_draw``, of ``control`` and of ``bound``.
        per_draw: Weighted squared error of each draw ``(B,)``.
        noised: The draws.
        target: What the network regressed on.
        control: The term of a control variate for each draw ``(B,)``, or None.
        bound: The term of a learned variance for each draw ``(B,)``, or None.
    """

    loss: Tensor
    per_draw: Tensor
    noised: Noised
    target: TargetEstimate
    control: Tensor | None = None
    bound: Tensor | None = None


def _labels(group: Tensor | None, cond_group: Tensor | None) -> Tensor | None:
    if cond_group is None:
        return group
    return torch.stack([x for x in (group, cond_group) if x is not None], dim=1)


class Times(NamedTuple):
    """Times of draws, each ``(K·B,)``; those of one sample stand next to each other.

    Attributes:
        t: Times.
        weight: Importance weights p/q.
        loss_weight: Products of importance weight and the loss weight ``λ b²``, where they are
            known as one number, or None.
    """

    t: Tensor
    weight: Tensor
    loss_weight: Tensor | None = None


@dataclass(frozen=True)
class StepPart:
    """The part of an optimizer step that one batch is: steps span ranks and accumulation.

    Attributes:
        number: Which part, ``0 .. count - 1``.
        count: Number of parts, of equally many samples each.
        shared: Generator in the same state for all parts; None if there is one part only.
    """

    number: int = 0
    count: int = 1
    shared: torch.Generator | None = None


WHOLE_STEP = StepPart()
