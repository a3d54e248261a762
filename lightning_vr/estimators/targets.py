"""Denoising score matching: the target is the clean sample itself (Vincent 2011).

``E[x0 | x_t]`` minimises ``E ‖x0_hat(x_t) - x0‖²``, so regressing on x0 is unbiased; the variance
of the target is the posterior variance ``tr Cov[x0 | x_t]``, V_DSM in x0 space.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_vr.core.types import Clean, Noised, TargetEstimate
from lightning_vr.estimators.slot import Slot


class Target(Slot, ABC):
    """Estimates E[x0 | x_t], the target of the network's regression."""

    bank_size: int | None = 0
    """Number of encoded training samples that ``fill`` needs before training; None for all."""

    sharded: bool = False
    """Whether each rank keeps only its shard of these."""

    data_version: Any = None
    """Which version of the training set they are, where each epoch has another."""

    @property
    def couples_rows(self) -> bool:
        """Whether the targets of one batch share randomness, so that they are dependent."""
        return False

    @abstractmethod
    def forward(self, noised: Noised, clean: Clean, generator: torch.Generator) -> TargetEstimate:
        """Estimate E[x0 | x_t] for each draw, without gradient.

        Args:
            noised: K·B draws of the B clean samples.
            clean: The samples that were noised, with the labels that are not dropped.
            generator: Source of all randomness.
        """

    def fill(
        self,
        x0: Tensor,
        group: Tensor | None,
        *,
        indexed: bool,
        cond_group: Tensor | None = None,
        is_shard: bool = False,
    ) -> None:
        """Receive encoded training samples before training; targets without references ignore them.

        Args:
            x0: Encoded samples in the order of the training set ``(N, *)``.
            group: Their labels ``(N,)``, or None.
            indexed: Whether the batches carry the samples' positions in the training set.
            cond_group: Numbers of their conditions ``(N,)``, or None.
            is_shard: Whether these are every W-th sample, starting with this rank's number, for a
                sharded target, which may then overwrite ``x0``.
        """


class DSM(Target):
    """The clean sample as its own target: unbiased, free, and as noisy as the posterior."""

    def forward(self, noised: Noised, clean: Clean, generator: torch.Generator) -> TargetEstimate:
        return own_sample(noised)


def own_sample(noised: Noised) -> TargetEstimate:
    """Return the samples that made ``noised`` as targets: ESS 1, no spread."""
    return TargetEstimate(noised.x0, torch.ones_like(noised.sigma), torch.zeros_like(noised.sigma))
