"""A step of score distillation against a loop that is written by hand, at one draw of each view."""

import itertools

import pytest
import torch
from support.networks import digits_unet
from torch import nn

from lightning_vr import IID, VP, FrozenTeacher, ScoreDistillationLoss

GUIDANCE = 5.0


class Scene(nn.Module):
    def __init__(self, views):
        super().__init__()
        self.views = views
        self.layers = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 64))

    def forward(self):
        return self.layers(torch.randn(self.views, 16)).reshape(-1, 1, 8, 8)


def ours(scene, network, optimizer):
    teacher = FrozenTeacher(network, VP(), num_classes=10, guidance=GUIDANCE)
    labels, loss = torch.full((scene.views,), 3), ScoreDistillationLoss(teacher, IID())

    def step():
        found = loss(scene(), group=labels)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        loss.advance()

    return step


def by_hand(scene, network, optimizer):
    views, schedule, calls = scene.views, VP(), itertools.count()
    labels = torch.tensor([10, 3]).repeat_interleave(views)

    def step():
        x = scene()
        with torch.no_grad():
            source = torch.Generator().manual_seed(next(calls))  # it draws again what it drew
            t = 0.02 + 0.96 * torch.rand(views, generator=source)
            noise = torch.randn(x.shape, generator=source)
            alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in schedule.scales(t))
            xt = alpha * x + sigma * noise
            time = 1000 * t
            both = network(torch.cat([xt, xt]), torch.cat([time, time]), labels).sample
            null, text = both.chunk(2)
            gradient = alpha * sigma**2 * (null + GUIDANCE * (text - null) - noise)
        optimizer.zero_grad()
        ((x * gradient).sum() / views).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize(("views", "rounds"), [(4, 300), (16, 120), (64, 60), (128, 40)])
def test_a_step_of_score_distillation_against_one_by_hand(compare, views, rounds):
    label = f"a step of ScoreDistillationLoss, one draw of {views} views, and one written by hand"
    # both have the same tensors: where these lie in memory changes the time by more
    scene = Scene(views)
    parts = scene, digits_unet().eval().requires_grad_(False), torch.optim.Adam(scene.parameters())
    own, other = compare(ours(*parts), by_hand(*parts), rounds=rounds, label=label)
    print(f"{own / other:.4f} times as long")
