"""Callbacks that sample from the model after a validation run.

``WeightAveraging`` swaps its weights in when a validation epoch starts and out when it ends, so
what a callback sees in between depends on the order of the callbacks. ``on_validation_end`` comes
after all of that, whatever the order; here the averaged weights are put in place explicitly.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_vr.core.rng import generator, preserve_global_rng
from lightning_vr.lifecycle.weight_averaging import averaged_weights
from lightning_vr.process.sampling import evaluating
from lightning_vr.training.module import DiffusionModule

SampleFunction = Callable[[LightningModule, int], Tensor]
"""``(module, count) -> samples (count, *)``, for modules that are not ours."""


class AfterValidation(Callback, ABC):
    """Measures on the model's samples at the end of validation and test runs.

    Args:
        sample: Draws samples from a module that is no ``DiffusionModule``.
        every_n_validations: Measure after every n-th validation run of a fit.
    """

    def __init__(self, sample: SampleFunction | None, every_n_validations: int) -> None:
        if every_n_validations < 1:
            raise ValueError(
                f"Argument `every_n_validations` expected to be at least 1, "
                f"but got {every_n_validations}."
            )
        self.sample = sample
        self.every_n_validations = every_n_validations
        self._validations = 0

    @abstractmethod
    def measure(self, trainer: Trainer, module: LightningModule) -> None:
        """Sample and report; the averaged weights are in place. All ranks call it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that cannot be sampled."""
        if self.sample is None and not isinstance(pl_module, DiffusionModule):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot sample from a {type(pl_module).__name__}: pass "
                f"`sample`, a function (module, count) -> samples, or use a DiffusionModule."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a trainer that never validates."""
        if not trainer.enable_validation:
            raise MisconfigurationException(
                f"{type(self).__name__} samples after each validation run, and this trainer has "
                f"none: give a validation DataLoader and a `limit_val_batches` above 0."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, with averaged weights where a callback keeps some."""
        if trainer.sanity_checking:
            return
        self._validations += trainer.state.fn == TrainerFn.FITTING
        if self._validations % self.every_n_validations == 0:
            with averaged_weights(trainer, pl_module):
                self.measure(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, with the weights that were tested."""
        self.measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validation runs so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def draw(self, module: LightningModule, count: int, key: str, start: int = 0) -> Tensor:
        """Return ``count`` decoded samples, of all those with ``key`` the ones from ``start`` on.

        They depend on the run's seed and these two alone. Classes, if there are any, are cycled
        over.
        """
        with module.trainer.precision_plugin.forward_context():
            if self.sample is None and isinstance(module, DiffusionModule):
                numbers = torch.arange(start, start + count)
                group = numbers % module.num_classes if module.num_classes else None
                source = generator(module.run_seed, key, start, device=module.device)
                return module.decode(module.sample(count, group=group, source=source))
            assert self.sample is not None
            with preserve_global_rng(), torch.no_grad(), evaluating(module):
                torch.manual_seed(generator(torch.initial_seed(), key, start).initial_seed())
                return self.sample(module, count)
