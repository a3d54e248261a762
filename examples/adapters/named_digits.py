"""Digits on their names: a module of one's own, as the command line takes it.

The network is one of text-to-image models, and a digit's name stands where its text would: one
token, a one-hot vector of ten. A network that was trained on some digits has met the tokens of the
others never.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_vr import Clean, DiffusionModule


class NamedDigits(DiffusionModule):
    """Scikit-learn's digits, each conditioned on its name."""

    def encode(self, batch: dict[str, Tensor]) -> Clean:
        label = batch["label"]
        # digits of one name are exchangeable, so that STF has references
        return Clean(
            batch["image"], cond=self._tokens(label), index=batch["index"], cond_group=label
        )

    def encode_condition(self, rows: dict[str, Any]) -> dict[str, Tensor]:
        return self._tokens(torch.tensor([int(digit) for digit in rows["digit"]]))

    def _tokens(self, label: Tensor) -> dict[str, Tensor]:
        tokens = nn.functional.one_hot(label.to(self.device), 10).float()
        return {"encoder_hidden_states": tokens[:, None]}
