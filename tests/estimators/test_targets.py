import torch

from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.estimators.draws import IID
from lightning_vr.estimators.targets import DSM
from lightning_vr.process.objective import Objective
from lightning_vr.process.schedules import EDM
from lightning_vr.process.timesteps import LogUniform
from lightning_vr.process.weightings import UnitWeighting


def signs_with_noise(count=40_000):
    """Draws of the two-point set ±1 with their exact posterior means."""
    source = generator("two points")
    x0 = torch.randint(2, (count, 1), generator=source).double() * 2 - 1
    clean = Clean(x0)
    noised = IID()(clean, Objective(EDM(), LogUniform(0.3, 3.0), UnitWeighting()), source)
    mean = torch.tanh(noised.xt / noised.sigma[:, None].double() ** 2)
    return noised, mean, DSM()(noised, clean, source)


def test_the_target_is_the_sample_that_was_noised():
    noised, _, target = signs_with_noise(100)
    assert target.x0 is noised.x0
    assert torch.equal(target.ess, torch.ones(100))
    assert torch.equal(target.spread, torch.zeros(100))


def test_the_target_is_unbiased_at_every_x_t(z_score):
    noised, mean, target = signs_with_noise()
    error = (target.x0 - mean)[:, 0]
    for low, high in ((-9, -1), (-1, -0.3), (-0.3, 0.3), (0.3, 1), (1, 9)):
        inside = (noised.xt[:, 0] > low) & (noised.xt[:, 0] <= high)
        assert abs(z_score(error[inside])) < 4


def test_the_variance_of_the_target_is_the_posterior_variance(z_score):
    _, mean, target = signs_with_noise()
    excess = (target.x0 - mean) ** 2 - (1 - mean**2)
    assert abs(z_score(excess[:, 0])) < 4
    assert float((1 - mean**2).mean()) > 0.3
