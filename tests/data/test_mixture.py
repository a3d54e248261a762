import math

import pytest
import torch

from lightning_vr.data import GaussianMixture

NOISES = [(1.0, 0.3), (0.8, 0.6), (0.2, 3.0)]


def isotropic() -> GaussianMixture:
    generator = torch.Generator().manual_seed(1)
    return GaussianMixture(
        torch.randn(4, 3, generator=generator, dtype=torch.float64),
        std=torch.tensor([0.2, 0.5, 0.0, 1.0], dtype=torch.float64),
        weights=torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64),
    )


def full() -> GaussianMixture:
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    return GaussianMixture(
        torch.randn(4, 3, generator=generator, dtype=torch.float64),
        covariances=root @ root.mT,
        weights=torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64),
    )


def noised(mixture: GaussianMixture, alpha: float, sigma: float, count: int = 16):
    generator = torch.Generator().manual_seed(3)
    x0, _ = mixture.sample(count, generator)
    return alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)


def posterior_covariance(mixture: GaussianMixture, xt, alpha: float, sigma: float):
    """Cov[x0 | x_t] from the Hessian of the log density, by the second-order Tweedie formula."""

    def log_density(x):
        return mixture.log_density(x[None], alpha, sigma)[0]

    hessian = torch.stack([torch.autograd.functional.hessian(log_density, row) for row in xt])
    return (sigma / alpha) ** 2 * (torch.eye(xt.shape[1], dtype=xt.dtype) + sigma**2 * hessian)


@pytest.mark.parametrize(("alpha", "sigma"), NOISES)
@pytest.mark.parametrize("build", [isotropic, full])
class TestIdentities:
    def test_score_is_the_gradient_of_the_log_density(self, build, alpha, sigma):
        mixture = build()
        xt = noised(mixture, alpha, sigma).requires_grad_()
        (gradient,) = torch.autograd.grad(mixture.log_density(xt, alpha, sigma).sum(), xt)
        torch.testing.assert_close(mixture.score(xt, alpha, sigma), gradient)

    def test_posterior_mean_obeys_tweedie(self, build, alpha, sigma):
        mixture = build()
        xt = noised(mixture, alpha, sigma)
        tweedie = (xt + sigma**2 * mixture.score(xt, alpha, sigma)) / alpha
        torch.testing.assert_close(mixture.posterior_mean(xt, alpha, sigma), tweedie)

    def test_posterior_variance_is_the_trace_of_the_covariance(self, build, alpha, sigma):
        mixture = build()
        xt = noised(mixture, alpha, sigma)
        trace = posterior_covariance(mixture, xt, alpha, sigma).diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(mixture.posterior_variance(xt, alpha, sigma), trace)

    def test_squared_error_of_the_posterior_mean_is_the_posterior_variance(
        self, build, alpha, sigma
    ):
        mixture = build()
        generator = torch.Generator().manual_seed(4)
        x0, _ = mixture.sample(20_000, generator)
        xt = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)

        error = (x0 - mixture.posterior_mean(xt, alpha, sigma)).square().sum(1)
        excess = error - mixture.posterior_variance(xt, alpha, sigma)
        assert abs(z_score(excess)) < 4


def z_score(values: torch.Tensor) -> float:
    return float(values.mean() / (values.std() / math.sqrt(len(values))))


def test_posterior_in_one_dimension_is_what_numerical_integration_gives():
    mixture = GaussianMixture(
        torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64),
        std=torch.tensor([0.3, 0.2, 0.6], dtype=torch.float64),
        weights=torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
    )
    alpha, sigma = 0.7, 0.5
    xt = torch.linspace(-3, 3, 9, dtype=torch.float64)

    x0 = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    normal = torch.distributions.Normal
    prior = sum(
        weight * normal(mean, std).log_prob(x0).exp()
        for weight, mean, std in [(0.5, -1.0, 0.3), (0.2, 0.5, 0.2), (0.3, 2.0, 0.6)]
    )
    joint = prior * normal(alpha * x0, sigma).log_prob(xt[:, None]).exp()
    density = torch.trapezoid(joint, x0)
    mean = torch.trapezoid(joint * x0, x0) / density
    variance = torch.trapezoid(joint * (x0 - mean[:, None]).square(), x0) / density

    points = xt[:, None]
    torch.testing.assert_close(mixture.log_density(points, alpha, sigma), density.log())
    torch.testing.assert_close(mixture.posterior_mean(points, alpha, sigma)[:, 0], mean)
    torch.testing.assert_close(mixture.posterior_variance(points, alpha, sigma), variance)


def test_posterior_in_two_dimensions_with_full_covariances_is_what_numerical_integration_gives():
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    covariances = torch.tensor(
        [[[0.4, 0.3], [0.3, 0.5]], [[0.3, -0.2], [-0.2, 0.4]]], dtype=torch.float64
    )
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mixture = GaussianMixture(means, covariances=covariances, weights=weights)
    alpha, sigma, xt = 0.7, 0.5, torch.tensor([[0.1, 0.4]], dtype=torch.float64)

    side = torch.linspace(-5, 5, 801, dtype=torch.float64)
    x0 = torch.cartesian_prod(side, side)
    normal = torch.distributions.MultivariateNormal
    prior = sum(
        weight * normal(mean, covariance).log_prob(x0).exp()
        for weight, mean, covariance in zip(weights, means, covariances, strict=True)
    )
    likelihood = (-(xt - alpha * x0).square().sum(1) / (2 * sigma**2)).exp()
    probability = prior * likelihood / (prior * likelihood).sum()
    mean = probability @ x0
    covariance = (x0 - mean).mT @ ((x0 - mean) * probability[:, None])

    torch.testing.assert_close(mixture.posterior_mean(xt, alpha, sigma)[0], mean)
    torch.testing.assert_close(posterior_covariance(mixture, xt, alpha, sigma)[0], covariance)
    torch.testing.assert_close(mixture.posterior_variance(xt, alpha, sigma)[0], covariance.trace())


@pytest.mark.parametrize(
    ("alpha", "sigma", "xt", "mean"),
    [(1.0, 1.0, 0.5, 0.46211716), (0.8, 0.6, 0.5, 0.80445480), (0.5, 0.5, 0.3, 0.53704957)],
)
def test_posterior_mean_of_two_points_is_a_hyperbolic_tangent(alpha, sigma, xt, mean):
    points = GaussianMixture(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), std=0.0)
    xt = torch.tensor([[xt]], dtype=torch.float64)
    torch.testing.assert_close(
        points.posterior_mean(xt, alpha, sigma).item(), mean, atol=1e-8, rtol=0
    )


def test_score_of_two_points_is_that_of_the_notes():
    points = GaussianMixture(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), std=0.0)
    xt = torch.tensor([[0.5]], dtype=torch.float64)
    assert points.score(xt, 1.0, 1.0).item() == pytest.approx(-0.03788284, abs=1e-8)
    assert points.score(xt, 0.8, 0.6).item() == pytest.approx(0.39878845, abs=1e-8)


def test_full_covariances_that_are_isotropic_give_what_standard_deviations_give():
    plain = isotropic()
    covariances = torch.diag_embed(plain.variances)
    turned = GaussianMixture(plain.means, covariances=covariances, weights=plain.weights)
    xt = noised(plain, 0.8, 0.6)
    for name in ("log_density", "score", "posterior_mean", "posterior_variance"):
        torch.testing.assert_close(
            getattr(turned, name)(xt, 0.8, 0.6), getattr(plain, name)(xt, 0.8, 0.6)
        )


@pytest.mark.parametrize("build", [isotropic, full])
def test_noise_levels_per_sample_give_what_one_sample_at_a_time_gives(build):
    mixture = build()
    xt = noised(mixture, 0.8, 0.6)
    alpha = torch.linspace(0.1, 1, len(xt), dtype=xt.dtype)
    sigma = torch.linspace(0.01, 5, len(xt), dtype=xt.dtype)
    for name in ("log_density", "score", "posterior_mean", "posterior_variance"):
        method = getattr(mixture, name)
        single = [
            method(row[None], float(a), float(s))
            for row, a, s in zip(xt, alpha, sigma, strict=True)
        ]
        torch.testing.assert_close(method(xt, alpha, sigma), torch.cat(single))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [isotropic, full])
def test_extreme_noise_gives_the_limits_of_the_posterior(build, dtype):
    mixture = build().to(dtype)
    x0, _ = mixture.sample(64, torch.Generator().manual_seed(5))

    clean = mixture.posterior_mean(x0, 1.0, 1e-4)
    torch.testing.assert_close(clean, x0, atol=1e-3, rtol=0)
    assert mixture.posterior_variance(x0, 1.0, 1e-4).max() < 1e-6

    prior_mean = mixture.weights @ mixture.means
    drowned = mixture.posterior_mean(1e4 * x0, 1.0, 1e4)
    torch.testing.assert_close(drowned, prior_mean.expand_as(drowned), atol=1e-2, rtol=0)

    for sigma in (1e-4, 1e-2, 1.0, 1e2, 1e4):
        for far in (0.0, 1.0, 1e3):
            for name in ("log_density", "score", "posterior_mean", "posterior_variance"):
                value = getattr(mixture, name)(far * x0, 1.0, sigma)
                assert value.isfinite().all(), (name, sigma, far)
            variance = mixture.posterior_variance(far * x0, 1.0, sigma)
            assert (variance >= 0).all()


def test_single_precision_agrees_with_double_precision():
    double = isotropic()
    single = isotropic().float()
    for sigma in (1e-2, 1.0, 1e2):
        xt = noised(double, 1.0, sigma)
        for name in ("score", "posterior_mean", "posterior_variance"):
            exact = getattr(double, name)(xt.float().double(), 1.0, sigma)
            rounded = getattr(single, name)(xt.float(), 1.0, sigma)
            torch.testing.assert_close(
                rounded.double(), exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max())
            )


def test_precision_of_the_result_is_that_of_the_input_and_never_half():
    mixture = full()
    xt = noised(mixture, 1.0, 1.0)
    for given, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        assert mixture.posterior_mean(xt.to(given), 1.0, 1.0).dtype == expected


def test_autocast_changes_nothing():
    mixture = full().float()
    xt = noised(mixture, 1.0, 0.5)
    plain = mixture.posterior_mean(xt, 1.0, 0.5), mixture.posterior_variance(xt, 1.0, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = mixture.posterior_mean(xt, 1.0, 0.5), mixture.posterior_variance(xt, 1.0, 0.5)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("build", [isotropic, full])
def test_samples_have_the_weights_means_and_covariances_of_the_components(build):
    mixture = build()
    x0, component = mixture.sample(40_000, torch.Generator().manual_seed(6))
    covariances = torch.diag_embed(mixture.variances)
    if mixture.axes is not None:
        covariances = mixture.axes @ covariances @ mixture.axes.mT

    for index in range(4):
        chosen = (component == index).double()
        assert abs(z_score(chosen - mixture.weights[index])) < 4
        centred = x0[component == index] - mixture.means[index]
        if covariances[index].any():
            outer = centred[:, :, None] * centred[:, None, :] - covariances[index]
            count = len(centred)
            z_mean = centred.mean(0) / (centred.std(0) / math.sqrt(count))
            z_covariance = outer.mean(0) / (outer.std(0) / math.sqrt(count))
            assert z_mean.abs().max() < 4
            assert z_covariance.abs().max() < 4
        else:
            assert not centred.any()


def test_samples_repeat_with_the_generator():
    first, second = (isotropic().sample(8, torch.Generator().manual_seed(7))[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"means": torch.zeros(3), "std": 1.0}, "`means` must be finite"),
        ({"means": torch.zeros(2, 2)}, "Exactly one .* must be given, got neither"),
        ({"std": 1.0, "covariances": torch.eye(2).expand(2, 2, 2)}, "must be given, got both"),
        ({"std": -1.0}, "`std` must be one non-negative number"),
        ({"std": torch.ones(3)}, "for each of the 2 components"),
        ({"std": 1.0, "weights": torch.tensor([0.5, 0.6])}, "2 positive numbers that sum to 1"),
        ({"std": 1.0, "weights": torch.tensor([1.0])}, "2 positive numbers that sum to 1"),
        ({"std": 1.0, "weights": torch.tensor([1.5, -0.5])}, "2 positive numbers that sum to 1"),
        ({"covariances": torch.eye(2)}, r"must have shape \(2, 2, 2\), got \(2, 2\)"),
        ({"covariances": -torch.eye(2).expand(2, 2, 2)}, "smallest eigenvalue of -1"),
        ({"covariances": torch.tensor([[1.0, 0.5], [0, 1]]).expand(2, 2, 2)}, "symmetric: False"),
    ],
)
def test_invalid_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{"means": torch.zeros(2, 2), **arguments})


@pytest.mark.parametrize(
    ("xt", "alpha", "sigma", "message"),
    [
        (torch.zeros(5, 2), 1.0, 1.0, r"`xt` must have shape \(B, 3\), got \(5, 2\)"),
        (torch.zeros(5, 3), torch.ones(4), 1.0, r"`alpha` must be a scalar or have shape"),
        (torch.zeros(5, 3), 1.0, torch.ones(5, 1), r"`sigma` must be a scalar or have shape"),
        (torch.zeros(5, 3), 1.0, 0.0, "`sigma` must be positive where a component has variance 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(xt, alpha, sigma, message):
    with pytest.raises(ValueError, match=message):
        isotropic().posterior_mean(xt, alpha, sigma)
