"""Small scenes for tests, and runs of them."""

import torch
from support.networks import small_mlp
from support.trainers import quiet_trainer
from torch import nn

from lightning_vr import CARV, VP, Clean, FrozenTeacher, LearnedProposal, OrbitViews
from lightning_vr import ScoreDistillation as Distillation
from lightning_vr.data import TwoGaussians

VIEWS = OrbitViews(4, antipodal=True)


def teacher(guidance=3.0, prediction="epsilon"):
    network = small_mlp(std=1.0, num_class_embeds=3)
    return FrozenTeacher(network, VP(), prediction, num_classes=2, guidance=guidance)


class Scene(Distillation):
    """Points in the plane for angles, by a small network with dropout."""

    def __init__(self, teacher, width=8, dropout=0.0, **settings):
        super().__init__(teacher, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = nn.Linear(4, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 2)
            self.scene = nn.Sequential(*layers)

    def render(self, batch):
        angles = torch.stack([batch.azimuth, batch.elevation], dim=1)
        x = self.scene(torch.cat([angles.cos(), angles.sin()], dim=1))
        return Clean(x, torch.arange(len(x)) % 2)


def scene(draws=None, **settings):
    settings = {"views": VIEWS, "optimizer": lambda p: torch.optim.Adam(p, 0.05)} | settings
    return Scene(teacher(), draws=draws or CARV(4, LearnedProposal(bins=4)), **settings)


def fit(module, *callbacks, seed=5, ckpt_path=None, length=24, batch_size=1, **options):
    torch.manual_seed(seed)
    trainer = quiet_trainer(*callbacks, **({"max_epochs": 1, "limit_val_batches": 0} | options))
    data = TwoGaussians(
        batch_size, 2, num_samples=length, num_validation=2
    )  # it resumes within an epoch
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights(module):
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()
