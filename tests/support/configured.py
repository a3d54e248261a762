"""A module of points in the plane with a value for every kind of argument."""

import functools

import torch

from lightning_vr import STF, VP, DiffusionModule, LogNormal, ResidualMLP, Sampler


def everything():
    return DiffusionModule(
        ResidualMLP(width=8, depth=1),
        schedule=VP(),
        prediction="v",
        timesteps=LogNormal(-1.0, 1.0),
        target=STF("all"),
        sampler=Sampler(steps=3),
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01, betas=(0.9, 0.95)),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3),
    )
