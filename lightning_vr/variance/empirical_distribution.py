"""The empirical distribution of a finite data set: its draws, its exact posterior, its divergence.

x0 is uniform on the N samples. With all of them as references, ``posterior_mean`` is exact.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vr.core.rng import generator
from lightning_vr.core.types import UNLABELLED, Clean, Noised
from lightning_vr.estimators.stf import STF
from lightning_vr.posterior.posterior_mean import Posterior, posterior_mean
from lightning_vr.posterior.references import References
from lightning_vr.posterior.streamed_softmax import label_mismatch


@dataclass(frozen=True)
class EmpiricalDistribution:
    """All samples, flat and in float64, as references of each other.

    Attributes:
        whole: STF on all samples.
        bank: The samples, centred.
        group: Class labels ``(N,)``, or None.
        cond_group: Numbers of further conditions ``(N,)``, or None.
    """

    whole: STF
    bank: References
    group: Tensor | None
    cond_group: Tensor | None

    @classmethod
    def prepare(
        cls, x0: Tensor, group: Tensor | None, cond_group: Tensor | None = None
    ) -> "EmpiricalDistribution":
        """Return the distribution of a data set ``(N, *)``."""
        device = torch.device("cpu") if x0.device.type == "mps" else x0.device
        whole = STF("all")
        group = None if group is None else group.to(device)
        cond_group = None if cond_group is None else cond_group.to(device)
        flat = x0.flatten(1).to(device).double()
        whole.fill(flat, group, indexed=True, cond_group=cond_group)
        assert isinstance(whole.bank, References)
        return cls(whole, whole.bank, group, cond_group)

    @property
    def size(self) -> int:
        """Number of samples N."""
        return len(self.bank)

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.bank.rows.device

    def target(self, references: int) -> STF:
        """Return STF on the shared bank, so that the measured target is the one that trains."""
        target = copy.copy(self.whole)
        target.references = references
        return target

    def draw(self, count: int, label_dropout: float, *key: int | str) -> Clean:
        """Draw samples, each as often as any other, give or take one."""
        source = generator(*key, "rows", device=self.device)
        passes = [
            torch.randperm(self.size, generator=source, device=self.device)
            for _ in range(math.ceil(count / self.size))
        ]
        index = torch.cat(passes)[:count]
        group = None if self.group is None else self.group[index]
        cond_group = None if self.cond_group is None else self.cond_group[index]
        if group is not None and label_dropout > 0:
            u = torch.rand(count, generator=source, device=self.device)
            group = torch.where(u < label_dropout, UNLABELLED, group)
        x0 = self.bank.rows[index] + self.bank.centre
        return Clean(x0, group, index=index, cond_group=cond_group)

    def posterior(self, noised: Noised) -> Posterior:
        """Return the exact posterior, around the own sample for its precision at low noise."""
        return posterior_mean(
            noised.xt,
            noised.alpha,
            noised.sigma,
            self.bank,
            own=noised.x0,
            exclude=noised.index,
            query_group=noised.labels,
        )

    def divergence(self, noised: Noised, log_evidence: Tensor) -> Tensor:
        """Return ``Σ ω f(1/(N ω))`` for each row, from ``N ω = p(x_t | x_i) / p(x_t)``."""
        query = noised.xt - self.bank.centre
        precision = noised.sigma**-2
        offset = 0.5 * query.shape[1] * torch.log(precision / (2 * math.pi)) - log_evidence
        offset -= 0.5 * precision * torch.linalg.vecdot(query, query)

        total, count, labels = torch.zeros_like(offset), torch.zeros_like(offset), noised.labels
        for start, rows, norms in self.bank.chunks(None, len(query), query.dtype):
            logits = precision[:, None] * (query @ rows.T - 0.5 * norms)
            ratio = torch.exp(logits + offset[:, None])
            terms = torch.where(ratio > 2 / 3, ratio * (ratio - 1) ** 2, 8 / 27 - ratio / 3)
            if labels is not None and self.bank.group is not None:
                is_foreign = label_mismatch(labels, self.bank.group[start : start + len(rows)])
                terms.masked_fill_(is_foreign, 0)
                count -= is_foreign.sum(dim=1)
            total += terms.sum(dim=1)
            count += len(rows)
        return total / count


def noise_at_levels(clean: Clean, levels: Tensor, *key: int | str) -> Noised:
    """Return each sample at every level ``(L,)`` with the same noise, its L draws in a row."""
    source = generator(*key, "noise", device=levels.device)
    shape, dtype = clean.x0.shape, clean.x0.dtype
    noise = torch.randn(shape, generator=source, device=levels.device, dtype=dtype)

    row = torch.arange(len(noise), device=levels.device).repeat_interleave(len(levels))
    sigma = levels.repeat(len(noise))
    clean, noise = clean.rows(row), noise[row]
    ones = torch.ones_like(sigma)
    xt = clean.x0 + sigma[:, None] * noise
    return Noised(
        xt,
        clean.x0,
        noise,
        sigma,
        ones,
        sigma,
        ones,
        clean.group,
        index=clean.index,
        cond_group=clean.cond_group,
    )
