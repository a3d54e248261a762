"""What a run is said to have learned: networks that are wrong at known levels, and known curves."""

import re

import pytest
import torch

from lightning_vr import ConvergenceMonitor
from lightning_vr.posterior.posterior_mean import posterior_mean
from lightning_vr.process.schedules import EDM
from lightning_vr.process.timesteps import LogUniform
from lightning_vr.variance.convergence_curves import Floors, Record
from lightning_vr.variance.convergence_summary import summarize

LEVELS = torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0], dtype=torch.float64)
EDGES = torch.tensor([0.2, 0.5, 2.0, 5.0], dtype=torch.float64)


class Denoiser(torch.nn.Module):
    """The exact denoiser of a data set, shrunk below one noise level."""

    def __init__(self, x, factor):
        super().__init__()
        self.x, self.factor = x, factor

    def forward(self, xt, t):
        mean = posterior_mean(xt, 1.0, t, self.x).mean
        wrong = t < EXACT_ABOVE
        return torch.where(wrong[:, None], self.factor * mean, mean)


EXACT_ABOVE = float(LogUniform(0.05, 20.0).icdf(torch.tensor(0.5)))


def loss(model, x0, noise, t):
    return (model(x0 + t[:, None] * noise, t) - x0).square().mean(dim=1)


def test_a_network_stopped_early_at_low_noise_is_said_to_be():
    """It is exact above 1 from the start, and wrong below 1, less so at the end."""
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    monitor = ConvergenceMonitor(
        x, loss=loss, schedule=EDM(), timesteps=LogUniform(0.05, 20.0), noise_levels=8, samples=64
    )
    for step, factor in [(0, 0.0), (500, 0.5), (1000, 0.75)]:
        monitor.update(step, Denoiser(x, factor))
    said = monitor.summary()
    assert said.startswith("At step 1000 the training loss is")
    assert "At noise levels above 1 it is at its floor." in said
    assert re.search(r"\d\d % of the distance lies at noise levels below 0\.\d+\.", said)
    assert "Since step 500 it has fallen by 75 ± 1 %." in said

    exact = ConvergenceMonitor(
        x, loss=loss, schedule=EDM(), timesteps=LogUniform(0.05, 20.0), noise_levels=8, samples=64
    )
    exact.update(0, Denoiser(x, 1.0))
    assert exact.summary().endswith("At all noise levels it is at its floor.")


def blocks(values, noise=0.001, seed=0):
    """Block means with given means, and little noise."""
    source = torch.Generator().manual_seed(seed)
    noise = noise * torch.randn(len(values), 16, generator=source, dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64)[:, None] + noise - noise.mean(1, keepdim=True)


def floors(low=(0.1,) * 5, high=None, held_out_high=None):
    low, zero = blocks(low, 0.0), torch.zeros(5, dtype=torch.float64)
    high = low if high is None else blocks(high, 0.0)
    others = (None, None) if held_out_high is None else (low, blocks(held_out_high, 0.0))
    return Floors(LEVELS, EDGES, low, (low + high) / 2, high, zero, zero, *others)


def run(*steps):
    """Records of given distances and held-out losses."""
    return [
        Record(i * 100, blocks(direct), None if held_out is None else blocks(held_out, seed=1))
        for i, (direct, held_out) in enumerate(steps)
    ]


def test_where_the_distance_lies_is_the_shortest_range_that_holds_most_of_it():
    said = summarize(floors(), run(([0.01, 0.3, 0.4, 0.01, 0.01], None)))
    assert "96 % of the distance lies at noise levels between 0.2 and 2." in said
    assert "at its floor" not in said


def test_what_does_not_hold_beyond_its_error_is_not_said():
    even = summarize(floors(), run(([0.2] * 5, None)))
    assert "% of the distance" not in even
    noisy = Record(0, blocks([0.1, 0.1, 0.5, 0.1, 0.1], noise=1.0), None)
    assert "% of the distance" not in summarize(floors(), [noisy])
    still = run(([0.2] * 5, None), ([0.2] * 5, None))
    assert "Since step 0 it has not changed beyond its standard error." in summarize(
        floors(), still
    )


def test_a_bracket_that_leaves_open_where_the_distance_lies_says_nothing_of_it():
    direct = [0.05, 0.05, 0.3, 0.05, 0.05]
    known = summarize(floors(high=[0.11] * 5), run((direct, None)))
    assert "between" in known.split(".", 2)[1] + known
    assert "% of the distance lies at noise levels between" in known
    unknown = summarize(floors(high=[0.1, 0.1, 0.5, 0.1, 0.1]), run((direct, None)))
    assert "% of the distance" not in unknown


def test_overfitting_and_underfitting_are_told_apart():
    under = run(([0.5] * 5, [0.6] * 5), ([0.4] * 5, [0.5] * 5), ([0.3] * 5, [0.4] * 5))
    said = summarize(floors(), under)
    assert "held-out gap" not in said
    assert "memorised" not in said
    over = run(
        ([0.3] * 5, [0.4] * 5),
        ([0.2] * 5, [0.35] * 5),
        ([0.01, 0.2, 0.1, 0.1, 0.1], [0.8, 0.35, 0.35, 0.35, 0.35]),
    )
    said = summarize(floors(), over)
    assert "The held-out gap opens since step 100" in said
    assert "mostly below 0.2, while the training loss has fallen" in said
    assert "At noise levels below 0.2 the training samples are memorised." in said


def test_what_memorisation_alone_would_gain_is_named():
    record = run(([0.3, 0.1, 0.1, 0.01, 0.01], [0.4, 0.2, 0.2, 0.11, 0.11]))
    said = summarize(floors(held_out_high=[5.0, 1.0, 0.2, 0.11, 0.11]), record)
    assert "At noise levels below 0.5 held-out data are denoised better than by" in said


def test_a_loss_that_is_not_finite_is_named_with_its_levels():
    record = run(([0.1] * 5, None))[0]
    record.direct[3, 2] = float("nan")
    assert summarize(floors(), [record]) == (
        "At step 0 the loss is not finite at noise levels between 2 and 5."
    )


def test_samples_whose_conditions_nobody_shares_have_no_known_floor():
    unknown = torch.full((5, 16), float("nan"), dtype=torch.float64)
    zero = torch.zeros(5, 16, dtype=torch.float64)
    found = Floors(LEVELS, EDGES, zero, unknown, unknown, zero[:, 0], zero[:, 0])
    said = summarize(found, run(([0.5] * 5, [0.6] * 5), ([0.3] * 5, [0.4] * 5)))
    assert "how much of it can be removed is unknown" in said
    assert "the held-out loss is 0.4" in said
    assert "of the distance" not in said
    assert "nan" not in said


@pytest.mark.parametrize("records", [[]])
def test_without_a_measurement_nothing_is_said(records):
    assert summarize(floors(), records) == "Nothing has been measured yet."
