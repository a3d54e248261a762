import math

import pytest
import torch

from lightning_vr.data import Checkerboard, EightGaussians, Moons


def ready(datamodule):
    datamodule.setup()
    return datamodule


def z_score(values: torch.Tensor) -> float:
    return float(values.mean() / (values.std() / math.sqrt(len(values))))


@pytest.mark.parametrize(
    "datamodule",
    [
        EightGaussians(),
        EightGaussians(std=0.6),
        Moons(),
        Moons(noise=0.5),
        Checkerboard(),
        Checkerboard(squares=6),
    ],
)
def test_points_are_centred_with_variance_one_per_coordinate(datamodule):
    x0 = ready(datamodule).train_dataset.x
    assert abs(z_score(x0[:, 0])) < 4
    assert abs(z_score(x0[:, 1])) < 4
    assert abs(z_score(x0.square().mean(1) - 1)) < 4
    assert datamodule.sigma_data == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("datamodule", [EightGaussians(), Moons(), Checkerboard()])
def test_all_classes_are_equally_frequent(datamodule):
    label = ready(datamodule).train_dataset.label
    fraction = 1 / datamodule.num_classes
    error = math.sqrt(fraction * (1 - fraction) / len(label))
    counts = label.bincount(minlength=datamodule.num_classes) / len(label)
    assert ((counts - fraction).abs() / error).max() < 4


def test_training_and_validation_sets_share_no_point():
    datamodule = ready(Moons(num_samples=500, num_validation=500))
    points = torch.cat([datamodule.train_dataset.x, datamodule.validation_dataset.x])
    assert len(points.unique(dim=0)) == 1000


def test_size_of_the_validation_set_does_not_change_the_training_set():
    small, large = ready(Moons(num_validation=10)), ready(Moons(num_validation=1000))
    assert torch.equal(small.train_dataset.x, large.train_dataset.x)
    assert len(large.validation_dataset) == 1000


def test_eight_gaussians_of_no_width_are_eight_points_on_a_circle():
    data = ready(EightGaussians(std=0.0)).train_dataset
    assert len(data.x.unique(dim=0)) == 8
    torch.testing.assert_close(data.x.norm(dim=1), torch.full((len(data),), math.sqrt(2)))


def test_mixture_of_the_eight_gaussians_is_the_density_of_its_points():
    datamodule = ready(EightGaussians(std=0.2))
    data = datamodule.train_dataset
    centred = data.x.double() - datamodule.mixture.means[data.label]
    assert abs(z_score(centred[:, 0])) < 4
    assert abs(z_score(centred.square().sum(1) - 2 * 0.2**2)) < 4


def test_moons_without_noise_are_two_half_circles():
    data = ready(Moons(noise=0.0)).train_dataset
    horizontal, vertical = 0.75, 0.5 - 4 / math.pi**2 + (2 / math.pi - 0.25) ** 2
    raw = data.x * math.sqrt((horizontal + vertical) / 2) + torch.tensor([0.5, 0.25])

    upper, lower = raw[data.label == 0], raw[data.label == 1] - torch.tensor([1.0, 0.5])
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(len(upper)))
    torch.testing.assert_close(lower.norm(dim=1), torch.ones(len(lower)))
    assert (upper[:, 1] > -1e-5).all()
    assert (lower[:, 1] < 1e-5).all()


@pytest.mark.parametrize("squares", [2, 4, 8])
def test_checkerboard_points_lie_on_the_dark_square_they_are_labelled_with(squares):
    data = ready(Checkerboard(squares=squares)).train_dataset
    cell = ((data.x / math.sqrt(3) + 1) / 2 * squares).floor().long()
    column, row = cell.unbind(1)
    assert ((column + row) % 2 == 0).all()
    assert torch.equal(data.label, row * (squares // 2) + column // 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EightGaussians(std=1.0), "`std` must be at least 0 and below 1"),
        (lambda: EightGaussians(std=float("nan")), "`std` must be at least 0 and below 1"),
        (lambda: Moons(noise=-1.0), "`noise` must be at least 0, got -1.0"),
        (lambda: Moons(num_samples=0), "`num_samples` must be at least 1, got 0"),
        (lambda: Moons(num_validation=0), "`num_validation` must be at least 1, got 0"),
        (lambda: Checkerboard(squares=3), "`squares` must be an even number of 2 or more"),
        (lambda: Checkerboard(squares=0), "`squares` must be an even number of 2 or more"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
