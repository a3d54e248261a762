"""A step of score distillation against a loop that is written by hand, at one draw of each view."""

import torch
from diffusers import UNet2DModel
from torch import nn

from lightning_vr import IID, VP, FrozenTeacher, ScoreDistillationLoss

VIEWS, GUIDANCE = 4, 5.0
LABELS = torch.full((VIEWS,), 3)


def network():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )


class Scene(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 64))

    def forward(self):
        return self.layers(torch.randn(VIEWS, 16)).reshape(VIEWS, 1, 8, 8)


def ours():
    scene, teacher = Scene(), FrozenTeacher(network(), VP(), num_classes=10, guidance=GUIDANCE)
    loss, optimizer = ScoreDistillationLoss(teacher, IID()), torch.optim.Adam(scene.parameters())

    def step():
        found = loss(scene(), group=LABELS)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        loss.advance()

    return step


def by_hand():
    scene, teacher, schedule = Scene(), network().eval().requires_grad_(False), VP()
    optimizer = torch.optim.Adam(scene.parameters())
    labels = torch.cat([torch.full_like(LABELS, 10), LABELS])

    def step():
        x = scene()
        with torch.no_grad():
            t = 0.02 + 0.96 * torch.rand(VIEWS)
            noise = torch.randn_like(x)
            alpha, sigma = schedule.alpha(t).view(-1, 1, 1, 1), schedule.sigma(t).view(-1, 1, 1, 1)
            xt = alpha * x + sigma * noise
            both = teacher(torch.cat([xt, xt]), torch.cat([1000 * t, 1000 * t]), labels).sample
            null, text = both.chunk(2)
            gradient = alpha * sigma**2 * (null + GUIDANCE * (text - null) - noise)
        optimizer.zero_grad()
        ((x * gradient).sum() / VIEWS).backward()
        optimizer.step()

    return step


def test_a_step_of_score_distillation_against_one_by_hand(compare):
    label = "a step of ScoreDistillationLoss with one draw and one written by hand"
    own, other = compare(ours(), by_hand(), rounds=300, label=label)
    print(f"{own / other:.4f} times as long")
