"""The best denoiser of a data set at given draws, and the loss that even it has: exact, or bounds.

For N samples the optimum is D(x_t) = E[x0 | x_t], the posterior mean under all of them, and the
irreducible loss at a noise level is ``V = E ‖x0 - D‖² = E tr Cov[x0 | x_t]``. It is computed around
the draw's own sample x0 with the other references S. Let f be the posterior weight of all others
together, and D_S their own posterior mean, which leaves x0 out. Then

    mean with the own sample:   D₁ = x0 - f (x0 - D_S),
    its posterior covariance:   tr Cov₁ = f tr Cov_S + f (1 - f) ‖x0 - D_S‖².

* **Exact** where S holds all others: D₁ = D, and the mean of tr Cov₁ is V, averaged over x0 given
  x_t already.
* **From a subset of n of the N - 1 others, a bracket.** D₁ is unbiased for D given x_t (it is a
  stable target, arXiv 2302.00670), so ``E ‖x0 - D₁‖² = E tr Cov₁ = V - E ‖D₁ - D‖² <= V``: the
  self-included estimate is the lower bound. D_S is a predictor that knows nothing of x0 but x_t,
  so ``E ‖x0 - D_S‖² >= V``: the estimate that leaves the own sample out (self-normalised importance
  sampling) is the upper bound, as is the loss of any network. All draws share S. Through the
  residuals ``x0 - D`` its choice counts to second order; tr Cov₁ at high noise is the variance of S
  itself, whose error no comparison of draws shows, and is used as a difference alone.
* **Between them** each other sample stands for C = (N - 1) / n, so that f becomes
  ``f_C = C f / (1 + (C - 1) f)``, consistent as n grows; C = 1 is the lower bound, C → ∞ the upper.
  ``E ‖x0 - D_C‖²`` is then too large and ``E tr Cov_C`` too small by about as much (both equal V
  for C = 1 and n = N - 1): their mean is the estimate. It lies below V at noise so low that the
  subset lacks the neighbours which mix.
* **Held-out samples** come from the data's distribution, of which the training set is a part of
  unknown size. Both bounds hold for it, averaged over training sets: ``E ‖x0 - D₁‖²`` with the
  held-out sample among the training set, and the held-out loss of the training set's own optimum.

Conditions: own sample and references must be exchangeable, so references of another class are
masked. A sample whose condition nobody shares is its own optimum: V is known to be at least 0.

Source: the estimators and the factor C are those of Xu et al. 2025, arXiv 2506.13763 (DOL with the
own sample, SNIS without it, cDOL between); the directions of the bounds as derived above.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_vr.core.devices import widest_float
from lightning_vr.core.types import UNLABELLED, Clean, Noised
from lightning_vr.posterior.posterior_mean import Posterior, posterior_mean
from lightning_vr.posterior.references import References, columns


class Optimum(NamedTuple):
    """The optimum at draws ``(B, *)``; squared errors are in x0 units, summed over dimensions.

    Attributes:
        x0: The posterior mean with the own sample, D₁, ``(B, *)``.
        low: tr Cov₁, or from a subset ‖x0 - D₁‖², ``(B,)``: its mean is V, or a lower bound of it.
        middle: The estimate between the bounds ``(B,)``; NaN where there is none.
        high: ‖x0 - D_S‖² ``(B,)``: its mean is an upper bound; NaN where there is none.
    """

    x0: Tensor
    low: Tensor
    middle: Tensor
    high: Tensor


@dataclass(frozen=True)
class Population:
    """References from a data set, and how large it is.

    Attributes:
        bank: The references, flat, with their labels.
        index: Their positions in the data set ``(n,)``, in increasing order.
        size: Number of samples of the data set, N.
    """

    bank: References
    index: Tensor
    size: int

    @classmethod
    def prepare(cls, references: Clean, size: int) -> "Population":
        """Return the population of ``references``, whose ``index`` says where they are among N."""
        x0, index = references.x0, references.index
        assert index is not None
        flat = x0.flatten(1).to(widest_float(x0.device))
        return cls(
            References.prepare(flat, references.labels), index.to(x0.device).contiguous(), size
        )

    @property
    def is_whole(self) -> bool:
        """Whether the references are the whole data set."""
        return len(self.bank) == self.size

    def positions(self, noised: Noised) -> Tensor | None:
        """Return where the own samples are among the references ``(B,)``, -1 where they are not."""
        if noised.index is None:
            return None
        wanted = noised.index.to(self.index)
        at = torch.searchsorted(self.index, wanted).clamp(max=len(self.index) - 1)
        return torch.where(self.index[at] == wanted, at, -1)

    def optimum(self, noised: Noised, *, is_held_out: bool = False) -> Optimum:
        """Return the optimum at draws of the data set, or of held-out data if said."""
        own = None if is_held_out else self.positions(noised)
        included = self._posterior(noised, own, noised.x0)
        target = included.mean.reshape(noised.x0.shape)
        if self.is_whole and not is_held_out:
            return Optimum(target, *[included.spread] * 3)

        excluded = self._posterior(noised, own, None)
        high = (_flat(noised.x0) - excluded.mean).square().sum(dim=1)
        low = (_flat(noised.x0) - included.mean).square().sum(dim=1)
        if is_held_out:
            return Optimum(target, low, torch.full_like(low, math.nan), high)
        used = len(self.bank) - (0 if own is None else (own >= 0).to(low))
        factor = (self.size - 1) / used
        others = torch.where(high > 0, torch.sqrt(low / high), 0)
        others = factor * others / (1 + (factor - 1) * others)
        spread = others * excluded.spread + others * (1 - others) * high
        middle = (others**2 * high + low + spread - included.spread) / 2
        return Optimum(target, low, middle, high)

    def pair_bound(self, noised: Noised) -> Tensor:
        """Return what the mean of V over draws is at most, by pairs of samples, ``(B,)``.

        With ``p_i = N(x_t; x_i, s² I)`` and ``D`` a distance of two samples,
        ``V = (1/N) Σ_{i<j} D² ∫ p_i p_j / Σ_k p_k <= (1/N) Σ_{i<j} D² ∫ p_i p_j / (p_i + p_j)``,
        an integral over one dimension, at most ``exp(-D²/8s²) min(1, √(2π) s/D) / 2``. It knows of
        events too rare to be among the draws, and is tight where only pairs mix.
        """
        own = self.positions(noised)
        query = _flat(noised.x0) - self.bank.centre
        level = (noised.sigma / noised.alpha).to(query)[:, None]
        labels, total = noised.labels, torch.zeros_like(query[:, 0])
        for start, rows, norms in self.bank.chunks(None, len(query), query.dtype):
            squared = query.square().sum(1, keepdim=True) + norms - 2 * query @ rows.T
            squared = squared.clamp(min=0)
            tail = (math.sqrt(2 * math.pi) * level / squared.sqrt()).clamp(max=1)
            terms = squared * torch.exp(-squared / (8 * level**2)) * tail.nan_to_num(1)
            here = torch.arange(start, start + len(rows), device=query.device)
            is_other = torch.ones_like(terms, dtype=torch.bool)
            if own is not None:
                is_other &= here != own[:, None]
            if labels is not None and self.bank.group is not None:
                theirs = columns(self.bank.group[start : start + len(rows)])
                is_other &= (columns(labels)[:, None] == theirs).all(dim=2)
            total += torch.where(is_other, terms, 0).sum(dim=1)
        return total / 4

    def linear_bound(self, noised: Noised) -> Tensor:
        """Return a bound of V at the noise level of each draw ``(B,)``: the best linear denoiser.

        ``V <= Σ_k λ_k s² / (λ_k + s²) <= d v s² / (v + s²)`` with the eigenvalues λ of the data's
        covariance and their mean v.
        """
        mean = self.bank.squared_norms.mean() / self.bank.rows.shape[1]
        return noised.x0[0].numel() * mean / (1 + mean * (noised.alpha / noised.sigma) ** 2)

    def control(self, noised: Noised) -> Tensor:
        """Return ``‖x0‖²`` of draws around the centre, less its mean over the references ``(B,)``.

        Of samples that are no references it has mean 0 up to a fraction 2 / n of that mean.
        """
        squared = (_flat(noised.x0) - self.bank.centre).square().sum(dim=1)
        return squared - self.bank.squared_norms.mean()

    @property
    def control_error(self) -> float:
        """Standard error of the mean that ``control`` subtracts."""
        return float(self.bank.squared_norms.std() / math.sqrt(len(self.bank)))

    def _posterior(self, noised: Noised, own: Tensor | None, x0: Tensor | None) -> Posterior:
        """Return the posterior under the others, and the own samples ``x0`` if given."""
        labels = None if self.bank.group is None else noised.labels
        if labels is not None and x0 is None:
            is_alone = ~self._has_other(labels, own)
            labels = labels.clone()
            labels[is_alone] = UNLABELLED
        precise = self.bank.rows.dtype
        xt = _flat(noised.x0) * noised.alpha[:, None] + _flat(noised.noise) * noised.sigma[:, None]
        return posterior_mean(
            xt,
            noised.alpha,
            noised.sigma,
            self.bank,
            own=None if x0 is None else _flat(x0).to(precise),
            exclude=own,
            query_group=labels,
        )

    def _has_other(self, labels: Tensor, own: Tensor | None) -> Tensor:
        """Return for which rows some other reference has their labels ``(B,)``.

        The others' predictor uses all references for a label that nobody else has: it still knows
        nothing of x0 but x_t, and its loss is an upper bound.
        """
        assert self.bank.group is not None
        matches = (columns(labels)[:, None] == columns(self.bank.group)).all(dim=2).sum(dim=1)
        is_own = 0 if own is None else (own >= 0).to(matches)
        return matches > is_own


def own_optimum(noised: Noised) -> Optimum:
    """Return the optimum of samples whose conditions nobody shares: themselves."""
    zero = torch.zeros(len(noised.t), dtype=torch.float64, device=noised.t.device)
    unknown = torch.full_like(zero, math.nan)
    return Optimum(noised.x0, zero, unknown, unknown)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1).to(widest_float(x.device))
