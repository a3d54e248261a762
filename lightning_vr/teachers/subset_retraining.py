"""Models retrained on subsets of the training set, all of them at once by one vmap.

They are the ground truth of data attribution: what a model would give that had not seen some
samples. A few dozen small models train together in little more time than one, as each of their
operations is one batched operation (``torch.func.stack_module_state``). All begin with the same
weights. In a step all have the same batch, times and noises, and each counts those samples alone
that are in its subset, so that models differ by their data and by nothing else.

A constant learning rate leaves each model at a random distance from its optimum, which no score of
the data predicts: let it fall to 0 by ``lr_scheduler``. Cosines and products of gradients suppose
steps along the gradient: models that SGD trains are closer to them than those of Adam.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_vr.core.devices import device_of
from lightning_vr.core.rng import generator
from lightning_vr.core.rows import tensors
from lightning_vr.core.types import Clean
from lightning_vr.core.validation import check_at_least, check_fraction
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import Draws
from lightning_vr.teachers.gradient_features import DrawOutput
from lightning_vr.training.diffusion import Diffusion


def subset_masks(count: int, subsets: int, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """Return random subsets of equal size ``(subsets, count)``, bool.

    Args:
        count: Number of training samples.
        subsets: Number of subsets.
        fraction: Fraction of the samples in each.
        seed: Seed of the choice.
    """
    check_at_least("subsets", subsets, 1)
    check_fraction("fraction", fraction)
    size = max(1, round(fraction * count))
    order = torch.rand(subsets, count, generator=generator(seed, "subsets")).argsort(dim=1)
    return torch.zeros(subsets, count, dtype=torch.bool).scatter_(1, order[:, :size], value=True)


class SubsetModels:
    """Models of one architecture, each trained on its own subset.

    Args:
        model: The model that each of them begins as; it is not changed. Batch normalisation and
            other buffers that training changes are not supported.
        masks: The samples of each subset ``(m, n)``, bool, each with one sample at least.
        optimizer: Makes the optimizer; one that treats every number alike, as SGD, Adam and AdamW
            do, since those of all models are stacked.
        lr_scheduler: Makes the learning-rate schedule, over steps, from the optimizer.
        seed: Seed of batches and draws.
    """

    def __init__(
        self,
        model: Diffusion,
        masks: Tensor,
        optimizer: Callable[[Iterable[Any]], Optimizer] = torch.optim.AdamW,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        seed: int = 0,
    ) -> None:
        if not bool(masks.any(dim=1).all()):
            raise ValueError("`masks` must give each subset one sample or more: leave out others.")
        self.model = copy.deepcopy(model).eval()
        self.masks, self.seed, self.steps = masks, seed, 0
        self._function = DrawOutput(self.model, "loss")
        self._parameters = {
            name: p.detach().expand(len(masks), *p.shape).clone().requires_grad_()
            for name, p in self._function.named_parameters()
        }
        self._buffers = dict(self._function.named_buffers())
        self._optimizer = optimizer(self._parameters.values())
        self._lr_scheduler = None if lr_scheduler is None else lr_scheduler(self._optimizer)

    def train(
        self, clean: Clean, steps: int, batch_size: int = 32, draws: Draws | None = None
    ) -> Tensor:
        """Train all models, and return the loss of each in each step ``(steps, m)``.

        Args:
            clean: The training set ``(n, *)``.
            steps: Number of further steps.
            batch_size: Samples in a step, drawn from the whole set without replacement.
            draws: Times and noise; strata over the batch if not given.
        """
        found, draws = [], draws or CARV(1)
        masks = self.masks.to(clean.x0.device, torch.float32)
        fractions = masks.mean(dim=1)
        for _ in range(steps):
            order = generator(self.seed, "batches", self.steps)
            index = torch.randperm(len(clean.x0), generator=order)[:batch_size].to(masks.device)
            source = generator(self.seed, "retraining", self.steps, device=device_of(self.model))
            losses = self._losses(clean.rows(index), draws, source).mean(dim=2)
            per_model = (masks[:, index] * losses).mean(dim=1) / fractions
            self._optimizer.zero_grad()
            torch.autograd.backward(per_model.sum())
            self._optimizer.step()
            if self._lr_scheduler is not None:
                self._lr_scheduler.step()
            found.append(per_model.detach())
            self.steps += 1
        return torch.stack(found)

    @torch.no_grad()
    def losses(self, clean: Clean, draws: Draws) -> Tensor:
        """Return the loss of each model for each sample ``(m, q)``, on the same draws for all."""
        source = generator(self.seed, "losses", device=device_of(self.model))
        return self._losses(clean, draws, source).mean(dim=2)

    def parameters_of(self, number: int) -> dict[str, Tensor]:
        """Return the weights of one model, as its ``state_dict`` names them."""
        return {
            name.removeprefix("model."): p[number].detach() for name, p in self._parameters.items()
        }

    def _losses(self, clean: Clean, draws: Draws, source: torch.Generator) -> Tensor:
        """Return the loss of each model at each draw ``(m, B, K)``."""
        rows = tensors(draws(clean, self.model.objective, source))

        def one(parameters: dict[str, Tensor]) -> Tensor:
            found: Tensor = functional_call(self._function, (parameters, self._buffers), (rows,))
            return found

        losses: Tensor = vmap(one, randomness="different")(self._parameters)
        return losses.reshape(len(self.masks), len(clean.x0), -1)
