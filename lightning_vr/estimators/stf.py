"""Stable Target Fields: the posterior mean under a set of references as the target.

Xu, Tong and Jaakkola 2023, arXiv 2302.00670, equation 5, self-normalised weights over references
that hold the own sample x0. Given x_t and the *unordered* reference set S, the sample that made x_t
is distributed as the weights say, so the target is ``E[x0 | x_t, S]``: the Rao-Blackwellised DSM
target, unbiased for every number of references (Bertrand et al. 2025, proposition 2; the paper's
"bias" comes from leaving the own sample out). Its variance falls from V_DSM to 0 as S grows to the
whole data set, and ``E[spread] = V_DSM - V_STF`` by the law of total variance.

It stays unbiased only if S holds the own sample as the exact tensor that was noised, and the others
are exchangeable with it given everything that the network is conditioned on. Hence references of
another class or with another ``cond_group`` are masked, rows whose class is dropped use those of
all classes, rows with a condition without a number (text) fall back to DSM, and any switch must be
a rule of (sigma, x_t, S).
"""

import logging
import math
from typing import Literal

import torch
from torch import Tensor

from lightning_vr.core.distributed import gather_rows, rank, row_counts, world_size
from lightning_vr.core.rng import generator as keyed_generator
from lightning_vr.core.types import Clean, Noised, TargetEstimate
from lightning_vr.estimators.stf_arguments import check_bank, check_references, check_storage
from lightning_vr.estimators.targets import Target, own_sample
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.posterior.references import References
from lightning_vr.posterior.sharded_references import Bank, ShardedReferences, distances_to_copies
from lightning_vr.posterior.stored_references import StoredDtype, StoredReferences, as_stored

log = logging.getLogger(__name__)

_MIXING = 1e-3
"""Mean weight of other references above which the softmax is worth computing."""

_CALIBRATION = 512
"""Number of samples that determine ``min_noise_level="auto"`` with references from the batch."""

_ROUNDING = 0.02
"""Distance of a sample from its copy in the bank: an encoder in bfloat16 stays below it, and
augmentations exceed it."""


class STF(Target):
    """Weighted mean of references as the target.

    A bank holds one version of each sample. If ``encode`` returns another version each time, by
    random augmentation or a random latent, the others in the bank are not exchangeable with the own
    sample: let the data set hold each augmented sample under an index of its own, or use
    ``"batch"``. ``CachedLatents`` draws latents once in each epoch, and fills the bank again.

    In a bank all samples count equally, so samplers that weight or select samples raise an error.

    Args:
        references: Source of the references. ``"batch"``: the batches of all ranks. A number n: the
            own sample and n - 1 others, drawn anew in each step from a bank of the encoded training
            set, without replacement if the batches carry indices. ``"all"``: the whole bank, the
            exact posterior mean of the data set.
        min_noise_level: Noise level sigma/alpha below which the own sample is the target and no
            softmax is computed. ``"auto"`` finds, before training, the level below which the
            other references have less than 0.1 % of the weight on average.
        chunk_size: Number of references at a time; by default, temporaries take a few MB.
        sharded: Whether each of W ranks holds 1/W of the bank and answers the queries of all. The
            target is the same; a step needs more communication and less memory. With a number of
            references all ranks then draw the same ones.
        dtype: How the bank is kept. ``"bfloat16"`` halves it, and biases the target by less than
            the rounding of its references (``posterior/stored_references.py`` gives the bound);
            ``"uint8"`` is for pixels in [-1, 1], and exact for those of 8 bits. The own sample is
            always the exact one.
        storage: ``"memory"``, or ``"data"``: the bank is what the data set stores, the mapped files
            of ``CachedLatents(posterior="mean")`` or the 8-bit images that ``cache_bytes`` keeps.
            Then ``encode`` must return the samples as they are, and ``dtype`` is that of the data.
    """

    def __init__(
        self,
        references: int | Literal["batch", "all"] = "batch",
        min_noise_level: float | Literal["auto"] = 0.0,
        chunk_size: int | None = None,
        sharded: bool = False,
        dtype: StoredDtype = "float32",
        storage: Literal["memory", "data"] = "memory",
    ) -> None:
        super().__init__()
        check_references(references, min_noise_level, chunk_size, sharded)
        check_storage(references, dtype, storage)
        self.references = references
        self.min_noise_level = min_noise_level
        self.chunk_size = chunk_size
        self.sharded = sharded
        self.dtype = dtype
        self.storage = storage
        self.bank_size = (
            None if references != "batch" else _CALIBRATION * (min_noise_level == "auto")
        )
        self.bank: Bank | None = None
        self._switch = 0.0 if min_noise_level == "auto" else float(min_noise_level)
        self._indexed = False
        self._has_warned = False
        self._has_compared = False

    @property
    def switch(self) -> float:
        """The noise level in force below which the own sample is the target."""
        return self._switch

    @property
    def couples_rows(self) -> bool:
        return self.references != "all"

    def fill(
        self,
        x0: Tensor,
        group: Tensor | None,
        *,
        indexed: bool,
        cond_group: Tensor | None = None,
        is_shard: bool = False,
    ) -> None:
        self.set_bank(
            self._prepare(Clean(x0, group, cond_group=cond_group), is_shard), indexed=indexed
        )

    def set_bank(self, bank: Bank, *, indexed: bool) -> None:
        """Set prepared references, which other targets may use as well.

        Args:
            bank: All samples of the training set, sharded if the target is.
            indexed: Whether the batches carry the samples' positions in the training set.
        """
        if self.references != "batch":
            check_bank(self.references, len(bank), indexed)
            self.bank, self._indexed, self._has_compared = bank, indexed, False
        if self.min_noise_level == "auto":
            self._switch = self._mixing_noise_level(bank)
            log.info("STF: references matter above noise level %.3g", self._switch)

    @property
    def reads_ahead(self) -> bool:
        """Whether ``prefetch`` pays: references are drawn, and kept as they are stored."""
        local = None if self.bank is None or self.references == "all" else self.bank.local
        return isinstance(local, StoredReferences)

    def prefetch(self, generator: torch.Generator) -> None:
        """Begin to read what ``forward`` will draw from a generator in this state.

        It is that of rank 0 if the bank is sharded. Nothing changes but the time, also if
        ``forward`` is given another one.
        """
        bank = self._filled_bank(generator.device)
        bank.prefetch(self._draw_positions(bank, generator))

    def forward(self, noised: Noised, clean: Clean, generator: torch.Generator) -> TargetEstimate:
        own = own_sample(noised)
        if noised.cond is not None and noised.cond_group is None:
            self._warn_of_condition()
            return own
        references, exclude = self._draw_references(noised, clean, generator)
        if self._switch == 0:
            return self._estimate(noised, slice(None), references, exclude)
        mixed = (noised.noise_level >= self._switch).nonzero().squeeze(1)
        # a rank without queries must still answer those of the others
        if len(mixed) == 0 and not isinstance(references, ShardedReferences):
            return own
        part = self._estimate(noised, mixed, references, exclude)
        return TargetEstimate(
            own.x0.index_copy(0, mixed, part.x0),
            own.ess.index_copy(0, mixed, part.ess.to(own.ess)),
            own.spread.index_copy(0, mixed, part.spread.to(own.spread)),
        )

    def _estimate(
        self,
        noised: Noised,
        rows: Tensor | slice,
        references: Bank,
        exclude: Tensor,
    ) -> TargetEstimate:
        labels = noised.labels
        posterior = posterior_mean(
            noised.xt[rows],
            noised.alpha[rows],
            noised.sigma[rows],
            references,
            own=noised.x0[rows],
            exclude=exclude[rows],
            query_group=None if labels is None else labels[rows],
            chunk_size=self.chunk_size,
        )
        return TargetEstimate(posterior.mean, posterior.ess, posterior.spread)

    def _prepare(self, samples: Clean, is_shard: bool) -> Bank:
        is_split = self.sharded and world_size() > 1
        if is_split and not is_shard:
            samples = samples.rows(slice(rank(), None, world_size()))
        if self.dtype != "float32":
            x0, labels = as_stored(samples.x0, self.dtype), samples.labels
            prepare = ShardedReferences.stored if is_split else StoredReferences.prepare
            return prepare([x0], labels)
        if is_split:
            return ShardedReferences.prepare(samples.x0, samples.labels, in_place=is_shard)
        return References.prepare(samples.x0, samples.labels)

    def _draw_references(
        self, noised: Noised, clean: Clean, generator: torch.Generator
    ) -> tuple[Bank, Tensor]:
        """Return references and, for each row, the position that the own sample replaces."""
        if self.references == "batch":
            resamples = len(noised.x0) // len(clean.x0)
            counts = row_counts(len(clean.x0))
            positions = torch.arange(len(clean.x0), device=noised.t.device)
            positions = positions + sum(counts[: rank()])
            labels = None if clean.labels is None else gather_rows(clean.labels, counts)
            x0 = gather_rows(clean.x0.to(noised.x0.dtype), counts)
            references = References.prepare(x0, labels)
            return references, positions.repeat_interleave(resamples)
        bank = self._filled_bank(noised.t.device)
        if not self._has_compared and (self._indexed or not self.sharded):
            self.compare(noised.x0, self._index(noised) if self._indexed else None)
        if self.references == "all":
            return bank, self._index(noised)
        return self._draw_from_bank(bank, noised, generator)

    def _draw_from_bank(
        self, bank: Bank, noised: Noised, generator: torch.Generator
    ) -> tuple[Bank, Tensor]:
        index = bank.from_rank_zero(self._draw_positions(bank, generator))
        last = torch.full_like(noised.t, len(index) - 1, dtype=torch.int64)
        if not self._indexed:
            return bank.take(index), last
        position = index.new_full((len(bank),), -1)
        position[index] = torch.arange(len(index), device=index.device)
        own = position[self._index(noised)]
        return bank.take(index), torch.where(own >= 0, own, last)

    def _draw_positions(self, bank: Bank, generator: torch.Generator) -> Tensor:
        size, count = len(bank), int(self.references)
        if not self._indexed:
            return torch.randint(size, (count,), generator=generator, device=generator.device)
        return torch.randperm(size, generator=generator, device=generator.device)[:count]

    def _filled_bank(self, device: torch.device) -> Bank:
        if self.bank is None:
            raise RuntimeError(
                f"STF(references={self.references!r}) has no bank, which `fit` fills: in a loop of "
                f"your own call `target.fill(x0, group, indexed=True)` with the encoded data set."
            )
        if self.bank.local.centre.device != device:
            self.bank = self.bank.to(device)
        return self.bank

    def _index(self, noised: Noised) -> Tensor:
        if noised.index is None:
            raise ValueError(
                f"STF(references={self.references!r}) got a batch without sample indices: `encode` "
                f"must set `index` in every training batch, as it did when the bank was filled."
            )
        return noised.index

    def compare(self, x0: Tensor, positions: Tensor | None) -> None:
        """Warn if samples ``(B, *)`` differ from their copies in the bank, if it is on this rank.

        Args:
            x0: Encoded samples.
            positions: Their positions in the training set ``(B,)``; None compares each with the
                reference that is nearest to it.
        """
        bank = self._filled_bank(x0.device)
        distance = distances_to_copies(bank, x0, positions)
        self._has_compared = len(distance) > 0
        if bool((distance > _ROUNDING).any()):
            log.warning(
                "STF(references=%r): samples differ from the bank's copies of them, so `encode` "
                "returns another version of a sample each time and the others in the bank are not "
                "exchangeable with it: the target is biased. Leave out the random augmentation or "
                "latent, give each version an index of its own, or use references='batch'.",
                self.references,
            )

    def _warn_of_condition(self) -> None:
        if not self._has_warned:
            log.warning(
                "STF: batches have a condition besides class labels, so that no two samples are "
                "exchangeable: the target falls back to DSM."
            )
            self._has_warned = True

    def _mixing_noise_level(self, references: Bank, queries: int = 64) -> float:
        """Return the noise level where others have ``_MIXING`` of the weight on average."""
        source = keyed_generator("mixing noise level", device=references.local.centre.device)
        count = len(references) if self.references in ("batch", "all") else int(self.references)
        order = torch.randperm(len(references), generator=source, device=source.device)
        some = references.take(references.from_rank_zero(order[:count]))
        row = some.rows_at(torch.arange(min(queries, count), device=source.device))
        asked = some.local.take(row[row >= 0])
        size, dtype = (len(row), asked.rows.shape[1]), asked.rows.dtype
        noise = torch.randn(size, generator=source, device=source.device, dtype=dtype)[row >= 0]
        centred = some.at_origin()

        scale = math.sqrt(float(some.total(some.local.squared_norms.sum())) / len(some))
        low, high = math.log(1e-5 * scale + 1e-12), math.log(10 * scale + 1e-12)
        for _ in range(12):
            middle = 0.5 * (low + high)
            sigma = math.exp(middle)
            xt = asked.rows + sigma * noise
            posterior = posterior_mean(xt, 1.0, sigma, centred, query_group=asked.group)
            others = some.total((1 - 1 / posterior.ess).sum())
            is_mixing = float(others) / len(row) > _MIXING
            low, high = (low, middle) if is_mixing else (middle, high)
        return math.exp(low)
