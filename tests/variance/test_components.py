"""Components of gradient variance against closed forms, for both ways to measure them.

The model has two parameters u and v of three coordinates, and per draw

    loss = ½ ‖u - y‖² + ⟨v, w⟩,    y = x + t + t z,    w = t x (1 + z)   element by element

so that g_u = u - y and g_v = w. With x ~ N(M, 1) and z ~ N(0, 1) in each of D = 3 coordinates,
t uniform on (l, h), T = E t = (l + h) / 2 and W = Var t = (h - l)² / 12, per coordinate

    E[g_u | x, t] = u - x - t,   E[g_u | x] = u - x - T,   E g_u = u - M - T
    V_x = 1,        V_t = W,             V_z = E t² = W + T²

    E[g_v | x, t] = t x,         E[g_v | x] = T x,         E g_v = T M
    V_x = T²,       V_t = W E x²,        V_z = E t² E x² = (W + T²) (1 + M²)
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.variance.components import (
    Components,
    NestedSums,
    nested_components,
    two_batch_sizes,
)
from lightning_vr.variance.gradient_measurement import GradientMeasurement, NoisyLoss
from lightning_vr.variance.moments import Moments

LIMIT = 4.0
"""Standard errors that a statistical test allows."""

OFF = 5.0
"""Standard errors that a biased estimate is off by at least."""

D, M, U = 3, 0.7, 1.7
REPEATS, SAMPLES, BATCHES, BATCH = 100, 20, 2, 10
FEW = {"size": 8, "batch": 4}
"""So few samples that the square of a mean over them is far off the squared mean."""

BINS = pytest.mark.parametrize("bin", [(0.0, 1.0), (0.5, 0.75)], ids=["all", "bin"])


class Parameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.full((D,), U))
        self.v = nn.Parameter(torch.ones(D))


class Model(NoisyLoss):
    def __init__(self):
        super().__init__()
        self.module = Parameters()

    def times(self, clean, source, low, high):
        t = low + (high - low) * torch.rand(len(clean.x0), generator=source)
        return t, torch.ones_like(t)

    def noise(self, x0, source):
        return torch.randn(x0.shape, generator=source)

    def draw(self, clean, times, source):
        return {"x": clean.x0, "t": times[0], "z": self.noise(clean.x0, source)}

    def forward(self, rows):
        x, t, z = rows["x"], rows["t"][:, None], rows["z"]
        y, w = x + t + t * z, t * x * (1 + z)
        return 0.5 * (self.module.u - y).square().sum(1) + (self.module.v * w).sum(1)


class SharedNoise(Model):
    """One noise for all samples of a batch."""

    couples_rows = True

    def noise(self, x0, source):
        return torch.randn(1, D, generator=source).expand_as(x0)


def columns(u, v):
    """The whole, u and v."""
    return torch.tensor([u + v, u, v], dtype=torch.float64)


def closed_form(low, high):
    mean, variance = (low + high) / 2, (high - low) ** 2 / 12
    square, x_square = variance + mean**2, 1 + M**2
    data = columns(D, D * mean**2)
    timestep = columns(D * variance, D * variance * x_square)
    noise = columns(D * square, D * square * x_square)
    squared_mean = columns(D * (U - M - mean) ** 2, D * (mean * M) ** 2)
    return Components(data, timestep, noise, data + timestep + noise, squared_mean)


def samples(count, *key):
    return Clean(M + torch.randn(count, D, generator=generator(*key, "data")))


def measure(method, repeat, loss, bin=(0.0, 1.0), size=SAMPLES, batch=BATCH):
    measurement = GradientMeasurement(loss, lambda *key: generator(repeat, *key), [0, 1])
    if method == "per_sample":
        return measurement.per_sample(samples(size, repeat), low=bin[0], high=bin[1])
    batches = [samples(batch, repeat, unit) for unit in range(BATCHES)]
    return measurement.by_differences(batches, low=bin[0], high=bin[1])


def repeated(measure_once, repeats=REPEATS):
    moments = Moments(len(Components._fields), 3)
    for repeat in range(repeats):
        moments.add(torch.stack(tuple(measure_once(repeat))))
    return moments


def z_scores(moments, expected):
    return Components(*((moments.mean - torch.stack(tuple(expected))) / moments.error))


@BINS
@pytest.mark.parametrize("method", ["per_sample", "by_differences"])
def test_every_component_of_every_part_is_the_closed_form(method, bin):
    loss = Model()
    moments = repeated(lambda repeat: measure(method, repeat, loss, bin))
    expected = closed_form(*bin)
    for name, scores in z_scores(moments, expected)._asdict().items():
        assert (scores.abs() < LIMIT).all(), (name, scores)

    # every one of them is resolved: without it the test would not pass
    size = torch.stack(tuple(expected)).abs()
    if bin == (0.0, 1.0):
        resolved = size / moments.error
        assert (resolved > LIMIT).all(), resolved


def gradients(measurement, batches, bin=(0.0, 1.0)):
    """Gradients of batches with draws of their own, for each part ``(batches, D)``."""
    found = []
    for unit, clean in enumerate(batches):
        rows = measurement._draws(clean, (unit,), *bin)[0]
        found.append(measurement.gradient(rows, unit))
    return [torch.stack(part).double() for part in zip(*found, strict=True)]


def whole_and_parts(u, v):
    return torch.stack([u + v, u, v])


@BINS
def test_total_and_squared_mean_follow_from_two_batch_sizes(bin):
    loss, expected = Model(), closed_form(*bin)
    batches, batch = 3, FEW["batch"]
    plug_in = Moments(3)

    def measure_once(repeat):
        measurement = GradientMeasurement(loss, lambda *key: generator(repeat, *key), [0, 1])
        data = [samples(batch, repeat, unit) for unit in range(batches)]
        parts = gradients(measurement, data, bin)
        mean_square = whole_and_parts(*(part.square().sum(1).mean() for part in parts))
        square_of_mean = whole_and_parts(*(part.mean(0).square().sum() for part in parts))
        plug_in.add(square_of_mean)
        return two_batch_sizes(mean_square, square_of_mean, batches, batch)

    found = repeated(measure_once, 4 * REPEATS)
    scores = z_scores(found, expected)
    assert (scores.total.abs() < LIMIT).all()
    assert (scores.squared_mean.abs() < LIMIT).all()
    assert found.mean[:3].isnan().all()

    off = (plug_in.mean - expected.squared_mean) / plug_in.error
    bias = expected.total / (batches * batch)
    assert (off > OFF).all(), off
    assert ((off - bias / plug_in.error).abs() < LIMIT).all()


class PlugInSums(NestedSums):
    """Takes the square of the mean over all draws for the squared mean."""

    def components(self, squared_sum):
        sums = torch.cat([self._sums.sum(dim=1, keepdim=True), self._sums], dim=1) / self.units
        total = torch.cat([squared_sum.sum(0, keepdim=True), squared_sum]) / self.units**2
        return nested_components(*sums[:3], torch.zeros_like(total), total)


@pytest.mark.parametrize("method", ["per_sample", "by_differences"])
def test_the_square_of_the_mean_over_draws_would_be_told_from_the_closed_form(method, monkeypatch):
    monkeypatch.setattr("lightning_vr.variance.gradient_sums.NestedSums", PlugInSums)
    loss = Model()
    moments = repeated(lambda repeat: measure(method, repeat, loss, **FEW), 250)
    scores = z_scores(moments, closed_form(0.0, 1.0))
    assert (scores.squared_mean > OFF).all()
    assert (scores.data < -LIMIT).all()
    assert (scores.timestep.abs() < LIMIT).all()
    assert (scores.noise.abs() < LIMIT).all()


@pytest.mark.parametrize("method", ["per_sample", "by_differences"])
def test_noise_taken_for_the_timestep_would_be_told_from_the_closed_form(method, monkeypatch):
    """Squares in place of products of two noises: V_z ends up in V_t."""

    def confused(squares, same_time, same_data, unit_means, total_mean):
        return nested_components(squares, squares, same_data, unit_means, total_mean)

    monkeypatch.setattr("lightning_vr.variance.components.nested_components", confused)
    loss = Model()
    moments = repeated(lambda repeat: measure(method, repeat, loss), 50)
    scores = z_scores(moments, closed_form(0.0, 1.0))
    assert (scores.timestep > OFF).all()


def test_shared_noise_is_all_told_by_differences_and_not_per_sample():
    """One z for a batch of b: ``Var`` of its mean gradient has V_z = E ‖t̄ z‖² for u, times b

    b D (W / b + T²) = D (W + b T²), and for v, with the mean of t_i x_i in place of t̄,
    D (Var(t x) + b (T M)²), where Var(t x) = E t² E x² - (T M)²; V_x and V_t are as they were.
    """
    loss, mean, variance = SharedNoise(), 0.5, 1 / 12
    single = closed_form(0.0, 1.0)
    square, x_square = variance + mean**2, 1 + M**2
    noise = columns(
        D * (variance + BATCH * mean**2),
        D * (square * x_square + (BATCH - 1) * (mean * M) ** 2),
    )
    expected = single._replace(noise=noise, total=single.data + single.timestep + noise)

    by_differences = repeated(lambda repeat: measure("by_differences", repeat, loss))
    for name, scores in z_scores(by_differences, expected)._asdict().items():
        assert (scores.abs() < LIMIT).all(), (name, scores)

    scores = z_scores(repeated(lambda repeat: measure("per_sample", repeat, loss)), expected)
    assert (scores.noise < -OFF).all()
    assert (scores.total < -OFF).all()


class Dropped(Model):
    """``⟨u, dropout(x)⟩``: all that is random given x comes from the network."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.25)

    def forward(self, rows):
        return (self.module.u * self.dropout(rows["x"])).sum(1) + 0 * self.module.v.sum()


@pytest.mark.parametrize("method", ["per_sample", "by_differences"])
def test_dropout_counts_as_noise(method):
    """g = x m / (1 - p), m Bernoulli(1 - p): V_z = E x² p / (1 - p) and V_x = Var x."""
    zero = columns(0.0, 0.0)
    noise, data = columns(D * (1 + M**2) / 3, 0.0), columns(D, 0.0)
    expected = Components(data, zero, noise, data + noise, columns(D * M**2, 0.0))
    loss = Dropped()
    moments = repeated(lambda repeat: measure(method, repeat, loss))
    for name, scores in z_scores(moments, expected)._asdict().items():
        assert (scores[:2].abs() < LIMIT).all(), (name, scores)
    assert (moments.mean[:, 2] == 0).all()


def by_enumeration(gradients):
    """Means over all pairs of draws ``(n, 4, d)`` that share just what they are to share."""
    units, _, size = gradients.shape
    flat = gradients.reshape(-1, size).double()
    products = flat @ flat.T
    unit = torch.arange(4 * units) // 4
    time = torch.arange(4 * units) // 2
    same_unit, same_time = unit[:, None] == unit, time[:, None] == time
    itself = torch.eye(4 * units, dtype=torch.bool)
    squares = products[itself].mean()
    products_of = [
        products[same_time & ~itself].mean(),
        products[same_unit & ~same_time].mean(),
        products[~same_unit].mean(),
    ]
    levels = [squares, *products_of]
    noise, timestep, data = (a - b for a, b in pairwise(levels))
    return Components(data, timestep, noise, noise + timestep + data, levels[-1])


def test_sums_over_units_in_parts_are_the_means_over_all_pairs(source):
    gradients = 1 + torch.randn(6, 4, 10, generator=source, dtype=torch.float64)
    parts = [gradients[..., :3], gradients[..., 3:]]
    products = torch.stack([part @ part.mT for part in parts])
    sums = NestedSums(2)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        sums.add(products[:, start:stop])
    squared_sum = torch.stack([part.mean(1).sum(0).square().sum() for part in parts])

    found = sums.components(squared_sum)
    for column, part in enumerate([gradients, *parts]):
        for a, b in zip(found, by_enumeration(part), strict=True):
            torch.testing.assert_close(a[column], b, rtol=1e-12, atol=1e-12)


def test_ratios_are_those_of_the_components():
    zero = torch.zeros(3, dtype=torch.float64)
    total, squared_mean = (torch.tensor(x).double() for x in ([6.0, 2.0, 2.0], [2.0, 0.0, -1.0]))
    found = Components(zero, zero, total, total, squared_mean)
    assert found.second_moment.tolist() == [8.0, 2.0, 1.0]
    assert found.signal_to_noise.tolist() == [1 / 3, 0.0, -0.5]
    assert float(found.noise_scale[0]) == 3.0
    assert found.noise_scale[1:].isnan().all()
    scaled = found.scaled(5)
    assert scaled.total.tolist() == [30.0, 10.0, 10.0]
    assert scaled.squared_mean.tolist() == squared_mean.tolist()
    assert math.isclose(float(scaled.noise_scale[0]), 15.0)
