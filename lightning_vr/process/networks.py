"""One network that ships with the package: a residual MLP for points.

It is not named ``MLP``, as other libraries have one, and a short class name on the command line
must be unique. How it and others are called is in ``network_calls.py``.
"""

import math

import torch
from torch import Tensor, nn

from lightning_vr.core.validation import check_at_least


class ResidualMLP(nn.Module):
    """Residual multilayer perceptron on points, with sinusoidal time embedding.

    Args:
        dimension: Number of coordinates of a point.
        width: Width of the hidden layers, even.
        depth: Number of residual blocks.
        num_class_embeds: Number of class embeddings, the dropped label's included, or None.
    """

    def __init__(
        self,
        dimension: int = 2,
        width: int = 128,
        depth: int = 3,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(
                f"`width` must be even and positive, got {width}: use {max(2, width + width % 2)}."
            )
        check_at_least("dimension", dimension, 1)
        check_at_least("depth", depth, 1)
        if num_class_embeds is not None:
            check_at_least("num_class_embeds", num_class_embeds, 1)
        self.dimension, self.width, self.depth = dimension, width, depth
        self.num_class_embeds = num_class_embeds
        self.project_in = nn.Linear(dimension, width)
        self.embed_time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_class = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            for _ in range(depth)
        )
        self.project_out = nn.Linear(width, dimension)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Map points ``x (B, d)`` at times ``t (B,)`` to ``(B, d)``."""
        if x.ndim != 2:  # further axes would be broadcast against times
            raise ValueError(
                f"`network` must take points (B, {self.dimension}), got {tuple(x.shape)} for a "
                f"ResidualMLP: build another network for the shape of the data."
            )
        half = self.width // 2
        # with times up to a thousand, 16 bits are too few for the phase
        wide = torch.promote_types(x.dtype, torch.float32)
        fractions = torch.arange(half, device=t.device, dtype=wide) / half
        angles = t[:, None].to(wide) * torch.exp(-math.log(1e4) * fractions)
        context = self.embed_time(torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype))
        if self.embed_class is not None and class_labels is not None:
            context = context + self.embed_class(class_labels)
        hidden = self.project_in(x)
        for block in self.blocks:
            hidden = hidden + block(hidden + context)
        output: Tensor = self.project_out(hidden)
        return output
