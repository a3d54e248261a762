"""Denoisers that are known in closed form."""

import torch

from lightning_vr.data.mixture import GaussianMixture

MIXTURE = GaussianMixture(
    torch.tensor([[1.4], [-0.6]], dtype=torch.float64),
    std=0.4,
    weights=torch.tensor([0.3, 0.7], dtype=torch.float64),
)
"""Two lopsided bumps with mean 0."""


def mixture_denoiser(schedule, mixture=MIXTURE):
    """The exact E[x0 | x_t] of a mixture's points ``(B, 1)``."""

    def denoiser(xt, t):
        return mixture.posterior_mean(xt, schedule.alpha(t), schedule.sigma(t))

    return denoiser


def gaussian_denoiser(schedule, std):
    """The exact E[x0 | x_t] of data ``(B, *)`` that are normal with standard deviation ``std``."""

    def denoiser(xt, t):
        shape = (-1, *[1] * (xt.ndim - 1))
        alpha, sigma = schedule.alpha(t).view(shape), schedule.sigma(t).view(shape)
        return alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * xt

    return denoiser
