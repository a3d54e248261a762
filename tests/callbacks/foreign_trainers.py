"""Trainers that know nothing of this package, as people write them."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from lightning.pytorch import LightningModule
from support.networks import small_unet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


def labelled(size=24, batch_size=6):
    """Vectors of three classes, in an order that the global generator gives."""
    source = torch.Generator().manual_seed(0)
    y = torch.arange(size) % 3
    x = torch.randn(size, 4, generator=source) + y[:, None]
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)


def pictures(size=16, batch_size=4):
    """Pictures of 8 x 8 pixels in a dictionary."""
    source = torch.Generator().manual_seed(0)
    data = [{"image": x} for x in torch.randn(size, 1, 8, 8, generator=source)]
    return DataLoader(data, batch_size=batch_size, shuffle=True)


class Classifier(LightningModule):
    """Batch normalisation, dropout, a metric, and lists that grow."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.accuracy = MulticlassAccuracy(3)
        self.outputs = []
        self.steps = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.head(self.net(x))
        loss = F.cross_entropy(logits, y)
        self.steps += 1
        self.outputs.append(loss)  # with its graph, as the guide to Lightning 2 shows it
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "seen": float(self.steps)}, prog_bar=True)
        self.logger.experiment.log_metrics({"by_hand": self.steps}, self.global_step)
        return {"loss": loss, "logits": logits.detach()}

    def on_train_epoch_end(self):
        self.log("epoch_mean", torch.stack(self.outputs).mean().detach())
        self.outputs.clear()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class DDPM(LightningModule):
    """The training loop of diffusers' examples, on the global random state."""

    def __init__(self):
        super().__init__()
        self.unet = small_unet()
        self.scheduler = DDPMScheduler(num_train_timesteps=100)

    def training_step(self, batch, batch_idx):
        images = batch["image"]
        noise = torch.randn_like(images)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(images),))
        t = t.to(images.device)
        predicted = self.unet(self.scheduler.add_noise(images, noise, t), t).sample
        loss = F.mse_loss(predicted, noise)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def ddpm_loss(module, x0, noise, t):
    """The loss of ``DDPM`` for each sample."""
    t = t.long()
    predicted = module.unet(module.scheduler.add_noise(x0, noise, t), t).sample
    return (predicted - noise).square().flatten(1).mean(1)


class GAN(LightningModule):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        real = batch[0]
        for_generator, for_critic = self.optimizers()

        self.toggle_optimizer(for_generator)
        generated = self.generator(torch.randn(len(real), 2, device=self.device))
        loss = F.softplus(-self.critic(generated)).mean()
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()
        self.untoggle_optimizer(for_generator)

        self.toggle_optimizer(for_critic)
        lies = F.softplus(self.critic(generated.detach())).mean()
        for_critic.zero_grad()
        self.manual_backward(F.softplus(-self.critic(real)).mean() + lies)
        for_critic.step()
        self.untoggle_optimizer(for_critic)
        self.log_dict({"generator": loss, "critic": lies})

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters()) for net in (self.generator, self.critic)]


def critic_loss(module, x0, noise, t):
    """A loss that the critic of ``GAN`` might be trained with: to tell noised samples."""
    return F.softplus(module.critic(x0 + t[:, None] * noise)).squeeze(1)


class LeastSquares(LightningModule):
    """``½ (w · x)²`` of standard normal x: ``g = x (x · w)``, and its moments are known.

    ``E g = w`` and ``E ‖g‖² = (d + 2) ‖w‖²``, so that ``tr Cov g = (d + 1) ‖w‖²``. The weights
    stay as they are: the learning rate is zero.
    """

    def __init__(self, dim=3):
        super().__init__()
        self.layer = nn.Linear(dim, 1, bias=False)
        nn.init.constant_(self.layer.weight, 0.5)
        self.total = (dim + 1) * 0.25 * dim
        self.squared_mean = 0.25 * dim

    def training_step(self, batch, batch_idx):
        return 0.5 * self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def normal_points(size, batch_size, dim=3):
    """Standard normal points."""
    x = torch.randn(size, dim, generator=torch.Generator().manual_seed(1))
    return DataLoader(x, batch_size=batch_size)
