"""What a fitted control variate takes off the noise of a network that has learned something."""

import copy
import functools

import pytest
import torch
from lightning.pytorch import seed_everything
from support.trainers import quiet_trainer

from lightning_vr import CARV, STF, VE, Clean, DiffusionModule, ResidualMLP, TaylorCV
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.data import EightGaussians
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.gradient_measurement import GradientMeasurement

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

FIXED = (0.25, 0.5, 0.75, 1.0)


def train(network, control, steps):
    """Train a network on 32 points a step."""
    seed_everything(0, verbose=False)
    module = DiffusionModule(
        network,
        schedule=VE(0.002, 1.0),
        prediction="epsilon",
        control_variate=control,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    )
    data = EightGaussians(batch_size=32, num_samples=4096, num_validation=256)
    quiet_trainer(max_steps=steps, limit_val_batches=0).fit(module, data)
    return module, data


@functools.cache
def plainly_trained():
    """A network that was trained without a control variate, which takes half of the time."""
    seed_everything(0, verbose=False)
    network = ResidualMLP(2, width=32, depth=2)
    train(network, None, steps=400)
    return network


@functools.cache
def trained(order):
    """A module that was trained for 500 steps, the last 100 with a fit in every fifth."""
    control = TaylorCV(order, gate="open", bins=4, refit_every_n_steps=5)
    module, data = train(copy.deepcopy(plainly_trained()), control, steps=100)
    held_out = data.val_dataloader().dataset
    x0 = torch.stack([held_out[i]["x0"] for i in range(len(held_out))])
    return module.train(), Clean(x0)


def noise(module, clean, control, low=0.0, high=1.0):
    """The noise component of the gradient's variance with a control variate in the slot."""
    own, module.control_variate = module.control_variate, control
    try:
        groups = parameter_groups(module)[1]
        measurement = GradientMeasurement(DiffusionLoss(module), generator, groups)
        return float(measurement.per_sample(clean, "gain", low=low, high=high).noise[0])
    finally:
        module.control_variate = own


def test_at_noise_level_one_hundredth_order_0_leaves_less_than_one_hundredth():
    module, clean = trained(0)
    time = module.schedule.time(torch.tensor(0.01, dtype=torch.float64))
    v = float(module.timesteps.cdf(time))
    window = {"low": v - 0.005, "high": v + 0.005}
    plain = noise(module, clean, None, **window)
    assert plain > 100 * noise(module, clean, module.control_variate, **window)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("level", range(4))
def test_no_fixed_coefficient_takes_off_more_than_the_fitted_ones(order, level):
    """Up to the error of few draws, where next to nothing is left of the noise."""
    module, clean = trained(order)
    window = {"low": level / 4, "high": (level + 1) / 4}
    controls = [TaylorCV(order, gate="open", bins=4, coefficient=c) for c in (0.5, 1.0)]
    plain, half, whole, fitted = (
        noise(module, clean, control, **window)
        for control in (None, *controls, module.control_variate)
    )
    assert fitted < plain
    # of the same draws, the variance is a parabola of the coefficient
    curvature = 2 * (plain - 2 * half + whole)
    slope = whole - plain - curvature
    for coefficient in FIXED:
        fixed = plain + slope * coefficient + curvature * coefficient**2
        assert fitted < 1.1 * fixed + 1e-3 * plain


@pytest.mark.parametrize(
    "slots",
    [{"draws": CARV(2)}, {"target": STF("batch")}, {"draws": CARV(2), "target": STF("batch")}],
    ids=["carv", "stf", "both"],
)
def test_with_other_estimators_it_takes_off_noise_too(slots):
    """By differences of batches: strata and references are shared within one."""
    module, clean = trained(0)
    own = {name: getattr(module, name) for name in slots}
    units = [clean.rows(slice(i, i + 32)) for i in range(0, 256, 32)]
    groups = parameter_groups(module)[1]
    control, found = module.control_variate, []
    try:
        for name, slot in slots.items():
            setattr(module, name, slot)
        for module.control_variate in (None, control):
            measurement = GradientMeasurement(DiffusionLoss(module), generator, groups)
            low = measurement.by_differences(units, "gain", high=0.5)
            found.append(float(low.noise[0]))
    finally:
        module.control_variate = control
        for name, slot in own.items():
            setattr(module, name, slot)
    assert found[0] > 5 * found[1]
