"""Modules whose randomness is keyed by the seed of their run."""

import torch
from torch import nn

from lightning_vr.core.devices import device_of
from lightning_vr.core.distributed import rank
from lightning_vr.core.rng import generator


class KeyedModule(nn.Module):
    """A module that gives generators keyed by its run's seed, the rank and a purpose.

    Attributes:
        seed: The seed of the run; torch's initial seed if it is None.
    """

    seed: int | None = None

    @property
    def run_seed(self) -> int:
        """The seed in force, which a run keeps in its checkpoints."""
        return torch.initial_seed() % 2**63 if self.seed is None else self.seed

    def generator(self, *key: int | str, seed: int | None = None) -> torch.Generator:
        """Return the generator of this run, this rank and ``key``, on the module's device.

        Args:
            *key: What distinguishes this draw from others.
            seed: Used in place of the run's seed.
        """
        seed = self.run_seed if seed is None else int(seed)
        return generator(seed, rank(), *key, device=device_of(self))
