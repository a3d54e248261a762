"""Normal data, whose reverse process is known, and networks of twice the channels."""

import diffusers
import torch
from torch import nn

from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.reverse_estimate import ReverseEstimate
from lightning_vr.process.reverse_steps import ReverseSteps
from lightning_vr.process.schedules import expand

STD = 0.5
"""Standard deviation of the data."""


def scheduler(steps=20, betas="squaredcos_cap_v2"):
    return diffusers.DDPMScheduler(num_train_timesteps=steps, beta_schedule=betas)


def table(steps=20, betas="squaredcos_cap_v2"):
    return DiffusersSchedule(scheduler(steps, betas))


def posterior_variance(steps):
    """Var(x0 | x_k) of each step, for data of standard deviation STD."""
    signal, noise = (steps.alpha * STD) ** 2, steps.sigma**2
    return STD**2 * noise / (signal + noise)


def best_variance(steps):
    """The variance of each reverse step, which is normal: theorem 1 of 2201.06503."""
    beta_tilde = torch.where(steps.is_first, 0, steps.log_beta_tilde.exp())
    return beta_tilde + steps.x0_scale**2 * posterior_variance(steps)


def best_v(steps):
    """What a network has to say for ``best_variance``."""
    log_best = best_variance(steps).log()
    fraction = (log_best - steps.log_beta_tilde) / (steps.log_beta - steps.log_beta_tilde)
    return 2 * fraction - 1


def exact(schedule, count=None):
    """Return the exact estimator of the reverse process of ``count`` steps."""
    steps = ReverseSteps.of(schedule, count)
    v = best_v(steps)

    def estimate(xt, t, group=None, cond=None):
        number = torch.searchsorted(steps.timesteps, t.double().contiguous())
        alpha, sigma = steps.alpha[number], steps.sigma[number]
        scale = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
        x0 = expand(scale, xt) * xt.double()
        return ReverseEstimate(x0, expand(v[number], xt).expand_as(x0))

    return estimate


class TwoHalves(nn.Module):
    """A network of points with twice the channels, whose halves share a layer."""

    def __init__(self, num_class_embeds=None):
        super().__init__()
        self.num_class_embeds = num_class_embeds
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body, self.mean, self.variance = (nn.Linear(2, n) for n in (2, 2, 2))
            self.labels = nn.Embedding(num_class_embeds or 1, 2)

    def forward(self, x, t, class_labels=None):
        hidden = torch.tanh(self.body(x) + t[:, None] / 100)
        if class_labels is not None:
            hidden = hidden + self.labels(class_labels)
        return torch.cat([self.mean(hidden), self.variance(hidden)], dim=1)
