"""A scene of 3-D Gaussians with emission and absorption, seen by orthographic cameras."""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

SIDE = 8
"""Pixels along a side of a digit."""


class Gaussians(nn.Module):
    """Isotropic Gaussians with a brightness and an opacity each.

    Args:
        count: Number of Gaussians.
        supersampling: Rays along a side of each pixel; the cost of a view grows with its square.
        seed: Seed of the first scene.
    """

    def __init__(self, count: int = 48, supersampling: int = 8, seed: int = 0) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.position = nn.Parameter(0.4 * torch.randn(count, 3, generator=source))
        self.log_scale = nn.Parameter(torch.full((count,), -1.9))
        self.opacity = nn.Parameter(torch.zeros(count))
        self.brightness = nn.Parameter(torch.zeros(count))
        self.supersampling = supersampling
        side = SIDE * supersampling
        line = (torch.arange(side) + 0.5) * (2 / side) - 1
        grid = torch.stack(torch.meshgrid(-line, line, indexing="ij")[::-1], dim=-1)
        self.register_buffer("grid", grid.reshape(-1, 2), persistent=False)

    def forward(self, azimuth: Tensor, elevation: Tensor) -> Tensor:
        """Return images in [-1, 1] ``(R, 1, 8, 8)`` of views at angles in radians ``(R,)``."""
        x, y, z = self.position.T
        a, e = azimuth[:, None], elevation[:, None]
        right = a.cos() * x - a.sin() * z
        ahead = a.sin() * x + a.cos() * z
        up, depth = e.cos() * y - e.sin() * ahead, e.sin() * y + e.cos() * ahead
        order = depth.argsort(dim=1)
        centre = torch.stack([right, up], dim=-1).gather(1, order[..., None].expand(-1, -1, 2))
        scale, opacity, brightness = (
            own[order] for own in (self.log_scale.exp(), self.opacity, self.brightness)
        )
        distance = (self.grid[None, None] - centre[:, :, None]).square().sum(dim=-1)
        alpha = opacity.sigmoid()[..., None] * torch.exp(-0.5 * distance / scale[..., None] ** 2)
        alpha = 0.99 * alpha
        passed = torch.cumprod(1 - alpha, dim=1)
        seen = torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], dim=1)
        image = (seen * alpha * brightness.sigmoid()[..., None]).sum(dim=1)
        side = SIDE * self.supersampling
        return 2 * avg_pool2d(image.reshape(-1, 1, side, side), self.supersampling) - 1
