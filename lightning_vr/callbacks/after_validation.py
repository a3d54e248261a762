"""Callbacks that sample from the model after a validation run.

``EMA`` swaps its weights in when a validation epoch starts and out when it ends, so
what a callback sees in between depends on the order of the callbacks. ``on_validation_end`` comes
after all of that, whatever the order; here the averaged weights are swapped in explicitly.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_vr.callbacks.asked_conditions import Asked, asked, validated
from lightning_vr.core.rng import generator, preserve_global_rng
from lightning_vr.core.validation import check_at_least
from lightning_vr.data.conditions import Conditions, ConditionsSource
from lightning_vr.lifecycle.weight_averaging import averaged_weights
from lightning_vr.process.sampling import evaluating
from lightning_vr.training.module import DiffusionModule

SampleFunction = Callable[[LightningModule, int], Tensor]
"""``(module, count) -> samples (count, *)``, for modules that are no ``DiffusionModule``."""


class AfterValidation(Callback, ABC):
    """Evaluates samples of the model at the end of validation and test runs.

    Args:
        sample: Generates samples of a module that is no ``DiffusionModule``.
        every_n_validations: Evaluate after every n-th validation run of a fit.
        conditions: What samples are conditioned on: a file of prompts or labels, or its columns.
    """

    def __init__(
        self,
        sample: SampleFunction | None,
        every_n_validations: int,
        conditions: ConditionsSource | None = None,
    ) -> None:
        check_at_least("every_n_validations", every_n_validations, 1)
        self.sample = sample
        self.conditions = None if conditions is None else Conditions.of(conditions)
        self.every_n_validations = every_n_validations
        self._validations = 0

    @abstractmethod
    def evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        """Generate samples and report on them, on all ranks, with the averaged weights in place."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if the module cannot be sampled."""
        if self.sample is None and not isinstance(pl_module, DiffusionModule):
            raise MisconfigurationException(
                f"`sample` must be given, as {type(self).__name__} cannot sample from a "
                f"{type(pl_module).__name__}, got None: pass a function (module, count) -> "
                f"samples, or use a DiffusionModule."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if the trainer never validates, or if the module does not take the conditions."""
        if not trainer.enable_validation:
            raise MisconfigurationException(
                f"{type(self).__name__} samples after each validation run, but this trainer does "
                f"not validate: give a validation DataLoader and a `limit_val_batches` above 0."
            )
        if self.conditions is not None and isinstance(pl_module, DiffusionModule):
            with preserve_global_rng():
                asked(self.conditions, pl_module, torch.arange(len(self.conditions)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate with the averaged weights, if a callback keeps some."""
        if trainer.sanity_checking:
            return
        is_fit = trainer.state.fn == TrainerFn.FITTING
        number = self._validations + is_fit
        if not is_fit or number % self.every_n_validations == 0:
            with averaged_weights(trainer, pl_module):
                self.evaluate(trainer, pl_module)
        self._validations = number  # not before: an error in it lets a resumed run evaluate again

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate with the weights that were tested."""
        self.evaluate(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validation runs so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validation runs."""
        self._validations = state_dict["validations"]

    def asked(self, module: DiffusionModule, numbers: Tensor, each: int = 1) -> Asked:
        """Return what samples ``numbers (n,)`` are conditioned on."""
        with module.trainer.precision_plugin.forward_context():
            if self.conditions is not None:
                return asked(self.conditions, module, numbers // each)
            return validated(module.trainer, module, numbers // each)

    def generate(
        self, module: LightningModule, count: int, key: str, start: int = 0, *, each: int = 1
    ) -> Tensor:
        """Return ``count`` decoded samples of the stream ``key``, from number ``start`` on.

        They depend on the run's seed, the key and the start alone. Sample i has row ``i // each``
        of ``conditions``, or else the condition of that validation sample, cycled over; without a
        condition beside classes it has class i modulo their number.
        """
        with module.trainer.precision_plugin.forward_context():
            if self.sample is None and isinstance(module, DiffusionModule):
                numbers = torch.arange(start, start + count)
                group, cond = self.asked(module, numbers, each)
                source = generator(module.run_seed, key, start, device=module.device)
                samples = module.sample(count, group=group, cond=cond, source=source)
                return module.decode(samples)
            assert self.sample is not None
            with preserve_global_rng(), torch.no_grad(), evaluating(module):
                torch.manual_seed(generator(torch.initial_seed(), key, start).initial_seed())
                return self.sample(module, count)
