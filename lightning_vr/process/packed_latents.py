"""Latents as tokens, as Flux's transformer takes them.

Each square of 2 x 2 latent pixels becomes one token: ``(B, C, H, W)`` is ``(B, H W / 4, 4 C)``. A
token's place among the others is known to the network by its ids ``(0, row, column)`` alone; those
of text are zeros.
"""

import torch
from torch import Tensor


def pack(x: Tensor) -> Tensor:
    """Return latents ``(B, C, H, W)`` as tokens ``(B, H W / 4, 4 C)``.

    Raises:
        ValueError: If they are no pictures of even height and width.
    """
    if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            f"Samples must be pictures of even height and width for a network of packed tokens, "
            f"got {tuple(x.shape[1:])}: crop or pad them, or override `predict`."
        )
    batch, channels, height, width = x.shape
    squares = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens ``(B, H W / 4, 4 C)`` as latents ``(B, C, H, W)``."""
    squares = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def picture_ids(height: int, width: int, *, device: torch.device) -> Tensor:
    """Return the places of the tokens of a picture ``(H W / 4, 3)``."""
    rows = torch.arange(height // 2, device=device, dtype=torch.float32)
    columns = torch.arange(width // 2, device=device, dtype=torch.float32)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)


def text_ids(count: int, *, device: torch.device) -> Tensor:
    """Return the places of the tokens of a text ``(count, 3)``."""
    return torch.zeros(count, 3, device=device, dtype=torch.float32)
