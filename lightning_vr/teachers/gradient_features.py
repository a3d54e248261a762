"""Gradients of a diffusion model's loss by single samples, as features for data attribution.

    φ(x) = P ∇_θ E_{t, noise} [ f(x, t, noise; θ) ],

estimated by K draws and projected at random (TRAK, Park et al. 2023, arXiv 2303.14186; for
diffusion models Zheng et al. 2023, "D-TRAK", arXiv 2311.00500; noise of these features, Bettencourt
et al. 2026, arXiv 2605.21489). Each sample needs a feature of its own, so that all draws go to K.

*Shared* draws use the same K times and noises for all samples. Their errors are then alike, which
leaves the order of inner products, and the product itself biased: ``E⟨φ̂_q, φ̂_i⟩ = ⟨φ_q, φ_i⟩ +
tr Cov(φ̂_q, φ̂_i)``. *Independent* draws leave inner products of different samples unbiased. Sharing
pays while features are noisy and costs once they are good.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_vr.core.devices import device_of, uncompiled
from lightning_vr.core.rng import generator, preserve_global_rng
from lightning_vr.core.rows import Rows, mapped, rows_at, tensors
from lightning_vr.core.types import Clean, Noised
from lightning_vr.core.validation import check_choice, check_integer
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import IID, Draws
from lightning_vr.estimators.loss import diffusion_loss, network_output
from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.estimators.targets import DSM
from lightning_vr.process.sampling import evaluating
from lightning_vr.process.schedules import expand
from lightning_vr.teachers.distillation import check_distillation
from lightning_vr.teachers.frozen_teacher import FrozenTeacher
from lightning_vr.teachers.random_projection import RandomProjection
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.variance.gradient_measurement import SameTensors

Output = Literal["loss", "square"] | Callable[[Diffusion, Noised], Tensor]
"""What is differentiated, of each draw: ``"loss"``, the model's loss; ``"square"``, the squared
norm of the network's output per dimension, as in D-TRAK; or a function of model and draws ``(n,)``,
whose mean over p(t) counts."""

_CHUNK_ELEMENTS = 1 << 26
"""Gradients at a time, 256 MB in float32."""


class GradientFeatures:
    """Features of samples: gradients of a model's loss, averaged over draws and projected.

    Example::

        features = GradientFeatures(model, CARV(16, LearnedProposal(), antithetic=True))
        features.learn(loader)  # where the proposal draws
        scores = cosine_scores(features(queries, "query"), features(loader))

    Args:
        model: The model, or a frozen teacher. It is used in evaluation mode.
        draws: Times and noise of each sample.
        projection: Number of features; None for gradients as they are.
        output: What is differentiated.
        shared: Whether all samples have the same times and noises.
        seed: Seed of draws and projection.

    Raises:
        ValueError: If the projection is larger than the number of parameters, or if draws leave K
            open or would be biased.
    """

    def __init__(
        self,
        model: Diffusion | FrozenTeacher,
        draws: Draws | None = None,
        *,
        projection: int | None = 2048,
        output: Output = "loss",
        shared: bool = True,
        seed: int = 0,
    ) -> None:
        self.model = model.model if isinstance(model, FrozenTeacher) else model
        self.draws = draws or CARV(16, antithetic=True)
        self.shared, self.seed = shared, seed
        if not callable(output):
            check_choice("output", output, ("loss", "square"))
        check_distillation(self.draws, self.model.objective, type(self).__name__)
        self._function = DrawOutput(self.model, output)
        own = dict(self._function.named_parameters())
        trained = {name: p for name, p in own.items() if p.requires_grad}
        self._parameters = {name: p.detach() for name, p in (trained or own).items()}
        self.size = sum(p.numel() for p in self._parameters.values())
        self._projection = (
            None if projection is None else RandomProjection(self.size, projection, seed)
        )

    def __call__(self, data: Any, purpose: str = "train") -> Tensor:
        """Return the features of samples ``(n, d)``, in float32.

        Args:
            data: One batch, or batches in order, each as the model's ``encode`` takes it.
            purpose: Distinguishes the draws of these samples from those of others, unless they are
                shared: queries need others than the training set.
        """
        found = []
        for number, clean in enumerate(self._batches(data)):
            with torch.no_grad():
                noised = self._draw(clean, purpose, number)
            for gradients in self._gradients(noised, len(clean.x0)):
                if self._projection is None:
                    flat = torch.cat([each.flatten(1) for each in gradients], dim=1).float()
                    found.append(flat)
                else:
                    found.append(self._projection(gradients))
        return torch.cat(found)

    def learn(self, data: Any, count: int = 16) -> None:
        """Let the draws' proposal learn where gradients are large, before features are computed.

        Args:
            data: Samples as for a call; a few hundred draws in all are enough.
            count: Independent draws of each sample.

        Raises:
            ValueError: If the draws have no proposal that learns.
        """
        check_integer("count", count, 1)
        proposal = getattr(self.draws, "proposal", None)
        if not isinstance(proposal, LearnedProposal):
            raise ValueError(
                f"`draws` must have a LearnedProposal to learn, got {type(self.draws).__name__} "
                f"with {type(proposal).__name__}: use CARV(16, LearnedProposal())."
            )
        objective = self.model.objective
        for number, clean in enumerate(self._batches(data)):
            source = self._source("learn", number)
            with torch.no_grad():
                noised = IID()(clean.repeated(count), objective, source)
            moments = [
                cast(Tensor, sum(each.flatten(1).square().sum(dim=1) for each in gradients))
                for gradients in self._gradients(noised, len(noised.t))
            ]
            moment = torch.cat(moments)
            v = objective.timesteps.cdf(noised.t.double())
            if proposal.moment == "loss":
                moment = moment.sqrt()  # which it squares
            proposal.observe(v, torch.ones_like(moment), moment)
        proposal.advance()

    def loss_function(self, shape: tuple[int, ...]) -> Callable[[dict[str, Tensor], Any], Tensor]:
        """Return ``f(parameters, (x0, label))`` of one sample without a batch axis.

        It is what ``AttributionTask`` of dattri takes as its loss, with this model; all samples
        share their draws. ``parameters`` are those of the model by name, and a label is optional.

        Args:
            shape: Shape of a sample.
        """
        # here and not in a vmap, which would draw anew for each sample
        tape = self._tape(torch.zeros(1, *shape, device=device_of(self.model)))

        def loss(parameters: dict[str, Tensor], data: Any) -> Tensor:
            x0, *rest = data if isinstance(data, (tuple, list)) else (data,)
            if x0.shape != shape:
                raise ValueError(
                    f"A sample must have the `shape` of the loss function, {tuple(shape)}, got "
                    f"{tuple(x0.shape)}: call loss_function({tuple(x0.shape)})."
                )
            group = rest[0][None] if rest else None
            noised = _on_tape(Clean(x0[None], group), tape)
            named = {f"model.{name}": x for name, x in parameters.items()}
            rows = tensors(noised)
            found: Tensor = functional_call(self._function, named, (rows,))
            return found.mean()

        return loss

    def _batches(self, data: Any) -> Iterator[Clean]:
        is_batch = isinstance(data, (Tensor, Clean, dict, tuple))
        for batch in cast(Iterable[Any], [data] if is_batch else data):
            with torch.no_grad():
                clean = self.model.clean(_moved(batch, device_of(self.model)))
            yield clean

    def _draw(self, clean: Clean, purpose: str, number: int) -> Noised:
        if self.shared:
            return _on_tape(clean, self._tape(clean.x0[:1]))
        source = self._source(purpose, number)
        noised: Noised = self.draws(clean, self.model.objective, source)
        return noised

    def _tape(self, like: Tensor) -> Noised:
        """Return the draws that samples share ``(K, *)``, for the shape of one ``(1, *)``."""
        first, source = Clean(torch.zeros_like(like)), self._source("shared")
        tape: Noised = self.draws(first, self.model.objective, source)
        return tape

    def _gradients(self, noised: Noised, samples: int) -> Iterator[list[Tensor]]:
        """Yield gradients of some samples at a time ``(n, *)``, by parameter."""
        rows = mapped(tensors(noised), lambda x: x.reshape(samples, -1, *x.shape[1:]))
        fixed = {name: x.clone() for name, x in self._function.named_buffers()}

        def one(parameters: dict[str, Tensor], row: Rows) -> Tensor:
            found: Tensor = functional_call(self._function, (parameters, fixed), (row,))
            return found.mean()

        taken = vmap(grad(one), in_dims=(None, 0), randomness="different")
        chunk = max(1, _CHUNK_ELEMENTS // self.size)
        for start in range(0, samples, chunk):
            part = rows_at(rows, slice(start, start + chunk))
            with (
                preserve_global_rng(),
                uncompiled(),
                sdpa_kernel(SDPBackend.MATH),
                evaluating(self.model),
                SameTensors(),
            ):
                found = list(taken(self._parameters, part).values())
            yield found

    def _source(self, *key: int | str) -> torch.Generator:
        return generator(self.seed, "features", *key, device=device_of(self.model))


class DrawOutput(nn.Module):
    """What is differentiated, of each row of draws.

    Args:
        model: The model.
        output: What of it.
    """

    def __init__(self, model: Diffusion, output: Output) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, rows: Rows) -> Tensor:
        """Return the output of each row ``(n,)``, with its importance weight."""
        noised, model = Noised(**rows), self.model
        if self.output == "loss":
            target = DSM()(noised, Clean(noised.x0), generator())
            return diffusion_loss(model.predict, noised, target, model.objective).per_draw
        if callable(self.output):
            found = self.output(model, noised)
            if found.shape != noised.t.shape:
                raise ValueError(
                    f"`output` must return one number for each of {len(noised.t)} draws, got a "
                    f"tensor of shape {tuple(found.shape)}: take the mean over other axes."
                )
        else:
            output = network_output(model.predict, noised, model.objective)
            found = output.flatten(1).square().mean(dim=1)
        return noised.weight * found


def _on_tape(clean: Clean, tape: Noised) -> Noised:
    """Return draws whose times and noises are those of a tape for each sample ``(K·B, *)``."""
    own, count = clean.repeated(len(tape.t)), len(clean.x0)
    t, alpha, sigma, weight, noise = (
        torch.cat([x] * count) for x in (tape.t, tape.alpha, tape.sigma, tape.weight, tape.noise)
    )
    xt = expand(alpha, noise) * own.x0 + expand(sigma, noise) * noise
    noised = Noised(xt, own.x0, noise, t, alpha, sigma, weight, own.group, own.cond, own.index)
    if tape.loss_weight is None:
        return noised
    return replace(noised, loss_weight=torch.cat([tape.loss_weight] * count))


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: _moved(x, device) for name, x in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_moved(x, device) for x in batch)
    return batch
