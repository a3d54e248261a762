"""Moments of 64 per-sample gradients of a network, against three other ways to compute them.

``Σ ‖g‖²`` over the gradients and ``Σ g``, from 16 samples with four draws each. The rivals are
given the same rows. Run with ``pytest tests/benchmarks --benchmark-only -s -n 0``; figures are
printed, not asserted.
"""

import pytest
import torch
from support.networks import digits_unet
from torch import nn

from lightning_vr import Clean, DiffusionModule
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.core.rows import interleaved, mapped
from lightning_vr.data.digits import digits
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.gradient_measurement import GradientMeasurement

# both libraries hook layers whose inputs need no gradient
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

SAMPLES, DRAWS = 16, 4
ROUNDS = 5


class Plain(nn.Module):
    """Convolutions and linear layers in a line, of about as many parameters as the U-Net.

    Time and class come as pictures of one value: nothing is added or concatenated between layers.
    """

    def __init__(self, width=96, depth=3):
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.SiLU()]
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(256, 64)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, t, class_labels):
        conditions = [c.to(x.dtype)[:, None, None, None].expand_as(x) for c in (t, class_labels)]
        return self.layers(torch.cat([x, *conditions], dim=1)).reshape(x.shape)


class Measurement(GradientMeasurement):
    """Keeps the rows that it draws, so that others can be given the same."""

    rows = None

    def _draws(self, clean, key, low, high):
        self.rows = super()._draws(clean, key, low, high)
        return self.rows


class Problem:
    """Ours, and the rows of its 64 gradients for the others."""

    def __init__(self, network):
        torch.manual_seed(0)
        self.module = DiffusionModule(network(), num_classes=10, sigma_data=0.75)
        self.loss = DiffusionLoss(self.module)
        images, labels = digits()
        self.clean = Clean(images[:SAMPLES], labels[:SAMPLES])
        _, groups = parameter_groups(self.module)
        self.measurement = Measurement(
            self.loss, lambda *key: generator("benchmark", *key), [0] * len(groups)
        )
        self.parameters = list(self.module.parameters())

    def ours(self):
        """Everything that a measurement takes: draws, gradients, moments and components."""
        components = self.measurement.per_sample(self.clean)
        return components.second_moment[0]

    @property
    def rows(self):
        """Noised samples, and targets, of the 64 draws of the latest measurement."""
        if self.measurement.rows is None:
            self.ours()
        return interleaved(self.measurement.rows)

    def expected(self):
        """Moments by a plain loop."""
        return loop(self.loss, self.rows, self.parameters)


def loop(loss, rows, parameters):
    """``Σ ‖g‖²`` and ``Σ g`` from one backward pass for each row."""
    square, total = torch.zeros((), dtype=torch.float64), [torch.zeros_like(p) for p in parameters]
    for i in range(SAMPLES * DRAWS):
        row = mapped(rows, lambda x, i=i: x[i : i + 1])
        found = torch.autograd.grad(loss(row).sum(), parameters)
        square += sum(g.square().sum().double() for g in found)
        for sum_, g in zip(total, found, strict=True):
            sum_ += g
    return square, total


def of_batch(per_sample):
    """``Σ ‖g‖²`` and ``Σ g`` from the gradients ``(64, *)`` of each parameter."""
    square = sum(g.square().sum().double() for g in per_sample)
    return square, [g.sum(0) for g in per_sample]


def check(problem, moments):
    """Moments agree, and ours, whose sum is that of the measurement, with them."""
    square, total = problem.expected()
    assert float(moments[0]) == pytest.approx(float(square), rel=1e-3)
    scale = max(float(g.abs().max()) for g in total)
    for g, other in zip(total, moments[1], strict=True):
        torch.testing.assert_close(other.reshape(g.shape), g, rtol=1e-3, atol=1e-3 * scale)
    # E‖g‖² of the components is the mean of the squares
    assert float(problem.ours()) == pytest.approx(float(square) / (SAMPLES * DRAWS), rel=1e-3)


def test_per_sample_moments_of_a_unet_against_a_loop_over_rows(compare):
    problem = Problem(digits_unet)
    rows = problem.rows
    check(problem, loop(problem.loss, rows, problem.parameters))
    ours, other = compare(
        problem.ours,
        lambda: loop(problem.loss, rows, problem.parameters),
        rounds=ROUNDS,
        label="64 per-sample gradients of a U-Net and a loop over single rows",
    )
    print(f"{other / ours:.2f} times as fast")


def test_per_sample_moments_of_a_unet_against_opacus(compare):
    opacus = pytest.importorskip("opacus")
    problem, theirs = Problem(digits_unet), Problem(digits_unet)
    rows = problem.rows
    # Opacus reads the memory of what a convolution is given as if it were contiguous: after the
    # attention it is not, and two gradients would come out as zero
    for layer in theirs.module.network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    theirs.module.network = opacus.GradSampleModule(theirs.module.network, loss_reduction="sum")

    def rival():
        for parameter in theirs.parameters:
            parameter.grad = parameter.grad_sample = None
        theirs.loss(rows).sum().backward()
        return of_batch([parameter.grad_sample for parameter in theirs.parameters])

    check(problem, rival())
    ours, other = compare(
        problem.ours, rival, rounds=ROUNDS, label="64 per-sample gradients of a U-Net and Opacus"
    )
    print(f"{other / ours:.2f} times as fast")


def test_per_sample_moments_of_a_plain_network_against_backpack(compare):
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    problem, theirs = Problem(Plain), Problem(Plain)
    rows = problem.rows
    backpack.extend(theirs.module.network.layers)

    def rival():
        for parameter in theirs.parameters:
            parameter.grad = None
        with backpack.backpack(extensions.BatchGrad()):
            theirs.loss(rows).sum().backward()
        return of_batch([parameter.grad_batch for parameter in theirs.parameters])

    check(problem, rival())
    ours, other = compare(
        problem.ours,
        rival,
        rounds=ROUNDS,
        label="64 per-sample gradients of a plain network and BackPACK",
    )
    print(f"{other / ours:.2f} times as fast")
