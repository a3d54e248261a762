"""Mixtures of normal distributions on the line, and their quantiles under noise."""

import math

import torch

from lightning_vr.data.mixture import GaussianMixture

WIDE = torch.float64


def four_narrow_gaussians(width=0.03, std=0.5):
    """Equally likely and equally spaced components, of a standard deviation of ``std`` in all."""
    places = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=WIDE)
    scale = math.sqrt((std**2 - width**2) / float(places.square().mean()))
    return GaussianMixture(scale * places[:, None], std=width)


def normal(mean=0.0, std=0.5):
    """One component."""
    return GaussianMixture(torch.tensor([[mean]], dtype=WIDE), std=std)


def uniforms(count):
    """The middle of each of as many equally likely parts ``(count, 1)``."""
    return ((torch.arange(count, dtype=WIDE) + 0.5) / count)[:, None]


def quantiles(mixture, noise_level, count):
    """Quantiles of the noised mixture ``(count, 1)``, by bisection."""
    u, deviation = uniforms(count), (mixture.variances[:, 0] + noise_level**2).sqrt()
    reach = 10 * float(deviation.max()) + float(mixture.means.abs().max())
    low, high = torch.full_like(u, -reach), torch.full_like(u, reach)
    for _ in range(70):
        middle = (low + high) / 2
        scores = (middle - mixture.means[:, 0]) / deviation
        is_below = torch.special.ndtr(scores) @ mixture.weights[:, None] < u
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2
