"""What comes before the draws: batches become clean samples and conditions."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from lightning_vr.core.conditions import Condition, null_condition
from lightning_vr.core.keyed_module import KeyedModule
from lightning_vr.core.types import Clean

NullCondition = Literal["zeros"] | dict[str, Any] | None
"""What stands for a dropped condition; see ``Diffusion``."""


class Upstream(KeyedModule):
    """What a model makes of batches, and of the conditions that samples are asked for.

    Args:
        num_classes: Number of class labels that the network is conditioned on, or None.
        null_cond: What stands for a dropped condition.
    """

    def __init__(self, num_classes: int | None, null_cond: NullCondition) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.null_cond = null_cond

    def encode(self, batch: Any) -> Clean:
        """Turn a batch into clean samples; override it for latents or conditions.

        Unless overridden it takes what ``Clean.from_batch`` takes.
        """
        return Clean.from_batch(batch)

    def encode_condition(self, rows: dict[str, Any]) -> Condition:
        """Turn what samples are asked for into a condition; override it to sample from a file.

        Args:
            rows: The columns of ``conditions``, such as ``{"prompt": [...]}``: lists of n texts.
                Class labels, the column ``label``, are not among them.

        Raises:
            ValueError: Unless it is overridden.
        """
        columns = ", ".join(repr(name) for name in rows)
        raise ValueError(
            f"`conditions` must hold no more than 'label' for a {type(self).__name__}, which does "
            f"not say how to encode {columns}: override `encode_condition`."
        )

    def encode_null(self) -> Condition | None:
        """Return what stands for no condition, of one row; override it for an empty prompt."""
        return None

    def decode(self, x0: Tensor) -> Tensor:
        """Turn samples into pictures or other data; the identity unless overridden."""
        return x0

    def clean(self, batch: Any) -> Clean:
        """Encode a batch, without labels if the network is unconditional.

        Samples are exchangeable given what the network is conditioned on, so labels that it does
        not see must not mask references. A condition of one row is given to every sample.
        """
        clean = self.encode(batch).expanded()
        return clean if self.num_classes is not None else replace(clean, group=None)

    @property
    def has_null_cond(self) -> bool:
        """Whether something stands for no condition."""
        return self.null_cond is not None or type(self).encode_null is not Upstream.encode_null

    def stated_null(self) -> NullCondition:
        """Return what the model says stands for no condition, as ``null_cond`` or encoded."""
        return self.encode_null() if self.null_cond is None else self.null_cond

    def null_condition(self, cond: Condition | None) -> Condition | None:
        """Return what stands for no condition in the form of ``cond``, of one row.

        Raises:
            ValueError: If there is nothing of that form.
        """
        if cond is None:
            return None
        null = self.stated_null()
        if null is None:
            raise ValueError(
                f"`null_cond` must be given to leave out the condition {sorted(cond)}, got None: "
                f"use 'zeros', or override `encode_null`."
            )
        return null_condition(null, cond)
