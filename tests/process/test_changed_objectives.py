"""Densities and weights that change the objective, against closed forms."""

import math

import numpy
import pytest
import torch

from lightning_vr.lifecycle.configuration import describe, rebuild
from lightning_vr.process.asymmetric_density import Asymmetric
from lightning_vr.process.beta_density import Beta
from lightning_vr.process.noise_level_densities import EntropyRate, NoiseLevelDensity
from lightning_vr.process.predictions import prediction
from lightning_vr.process.schedules import EDM, VE, VP, RectifiedFlow
from lightning_vr.process.timesteps import LogitNormal, LogNormal, Shifted, Uniform
from lightning_vr.process.total_weight import TotalWeighting
from lightning_vr.process.uncertainty_weighting import UncertaintyWeighting
from lightning_vr.process.weightings import (
    LogNormalWeighting,
    MinSNRWeighting,
    P2Weighting,
    SoftMinSNRWeighting,
    UnitWeighting,
    Weighting,
)

WIDE = torch.float64
LEVELS = [0.02, 0.1, 0.5, 2.0, 40.0]
BETAS = [Beta(2, 3), Beta(0.6, 0.4), Beta(1, 1), Beta(40, 20), Beta(1.5, 1, end=1000.0)]
DENSITIES = [
    *BETAS,
    Asymmetric(),
    Asymmetric(700, 5, 0, 1000),
    NoiseLevelDensity(EDM(), LEVELS, [0.1, 1, 3, 2, 0]),
    NoiseLevelDensity(VP(), LEVELS, [0.5, 1, 3, 2, 1]),
    NoiseLevelDensity(RectifiedFlow(), LEVELS, [0.5, 1, 3, 2, 1]),
    EntropyRate(VE(), LEVELS, [1e-4, 5e-3, 0.1, 0.3, 0.35]),
]
every_density = pytest.mark.parametrize(
    "density", DENSITIES, ids=lambda d: f"{type(d).__name__}-{DENSITIES.index(d)}"
)


def integral(density, ends):
    """The integral of the density between neighbouring ends, by Gauss-Legendre."""
    nodes, weights = (torch.from_numpy(x) for x in numpy.polynomial.legendre.leggauss(24))
    low, half = ends[:-1, None], 0.5 * ends.diff()[:, None]
    return (half * weights * density.log_prob(low + half * (nodes + 1)).exp()).sum(1)


def kinks(density):
    """Quantiles at which a density is not smooth."""
    if isinstance(density, Asymmetric):
        return density.cdf(torch.tensor([density.turn], dtype=WIDE))
    if isinstance(density, NoiseLevelDensity):
        return density.cdf(density.schedule.time(torch.tensor(LEVELS[1:-1], dtype=WIDE)))
    return torch.zeros(0, dtype=WIDE)


@every_density
def test_the_inverse_cdf_inverts_the_integral_of_the_density(density):
    u = torch.cat([torch.linspace(0.001, 0.999, 400, dtype=WIDE), kinks(density)]).sort().values
    torch.testing.assert_close(integral(density, density(u)), u.diff(), rtol=1e-6, atol=1e-9)


@every_density
def test_the_cdf_inverts_the_inverse_cdf(density):
    u = torch.linspace(0.001, 0.999, 400, dtype=WIDE)
    torch.testing.assert_close(density.cdf(density(u)), u, rtol=1e-8, atol=1e-9)


@every_density
def test_strata_of_u_are_strata_of_t(density):
    """Equally likely cells each get one of as many stratified draws."""
    u = (torch.arange(64, dtype=WIDE) + torch.rand(64, dtype=WIDE)) / 64
    assert torch.equal((density.cdf(density(u)) * 64).floor(), torch.arange(64, dtype=WIDE))


@every_density
def test_the_log_density_keeps_the_dtype_and_is_minus_infinity_outside(density):
    u = torch.tensor([0.5], dtype=torch.float32)
    assert density(u).dtype == torch.float32
    inside = density.log_prob(density(u))
    assert inside.dtype == torch.float32
    assert inside.isfinite().all()
    # the last of all times, or what lies beyond the last noise level
    last = density(torch.tensor([1 - 1e-12], dtype=WIDE))
    beyond = last + 0.02 * (last - density(torch.tensor([0.5], dtype=WIDE)))
    beyond = beyond.clamp(min=getattr(density, "end", 0.0) * 1.01)
    assert density.log_prob(beyond.float()).tolist() == [-math.inf]


@pytest.mark.parametrize("density", BETAS, ids=lambda d: f"{d.a}-{d.b}")
def test_beta_times_have_the_moments_of_the_beta_distribution(density):
    u = (torch.arange(200_000, dtype=WIDE) + 0.5) / 200_000
    t, total = density(u) / density.end, density.a + density.b
    assert float(t.mean()) == pytest.approx(density.a / total, rel=1e-5)
    variance = density.a * density.b / (total**2 * (total + 1))
    assert float(t.var()) == pytest.approx(variance, rel=1e-3)


def test_beta_2_1_is_the_square_root_of_a_uniform_time():
    u = torch.tensor([1e-12, 1e-3, 0.3, 0.9, 1 - 1e-9], dtype=WIDE)
    torch.testing.assert_close(Beta(2, 1)(u), u.sqrt(), rtol=1e-7, atol=0)
    torch.testing.assert_close(Beta(1, 3)(u), 1 - (1 - u) ** (1 / 3), rtol=1e-6, atol=1e-12)


def test_asymmetric_times_are_five_times_as_likely_before_the_turn():
    density = Asymmetric(700, 5, 0, 1000)
    # k / (T + tau (k - 1)) before the turn, 1 / (T + tau (k - 1)) after it
    norm = 1000 + 700 * 4
    found = density.log_prob(torch.tensor([1.0, 699.0, 701.0, 999.0], dtype=WIDE)).exp()
    torch.testing.assert_close(found, torch.tensor([5, 5, 1, 1], dtype=WIDE) / norm)


def test_a_shift_of_logit_normal_times_is_a_shift_of_their_mean():
    u = torch.linspace(0.01, 0.99, 99, dtype=WIDE)
    torch.testing.assert_close(
        Shifted(LogitNormal(0.2, 0.8), 3.0)(u), LogitNormal(0.2 + math.log(3), 0.8)(u)
    )


def test_the_entropy_rate_of_normal_data_is_that_of_its_closed_form(schedule):
    """H(x0 | x_s) = log(tau² s² / (tau² + s²)) / 2 + constant, for normal data."""
    tau, levels = 0.5, torch.logspace(-1.5, 1, 60, dtype=WIDE)
    errors = tau**2 * levels**2 / (tau**2 + levels**2)
    density = EntropyRate(schedule, levels.tolist(), errors.tolist())
    entropy = 0.5 * torch.log(errors)
    expected = (entropy - entropy[0]) / (entropy[-1] - entropy[0])
    torch.testing.assert_close(density.cdf(schedule.time(levels)), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "part",
    [
        *DENSITIES,
        SoftMinSNRWeighting(3.0),
        P2Weighting(2.0),
        UncertaintyWeighting(LEVELS, LEVELS),
        TotalWeighting(LEVELS, LEVELS, Beta(2, 1)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_checkpoint_rebuilds_what_it_was_trained_with(part):
    built = rebuild(type(part), describe(part)["init_args"])
    t = torch.linspace(0.1, 0.9, 9, dtype=WIDE)
    if isinstance(part, Weighting):
        assert torch.equal(built(VP(), t), part(VP(), t))
    else:
        assert torch.equal(built(t), part(t))


SNR = torch.tensor([0.01, 1.0, 4.0, 100.0], dtype=WIDE)


@pytest.mark.parametrize(
    ("weighting", "on_epsilon"),
    [
        (P2Weighting(), [1 / 1.01, 0.5, 0.2, 1 / 101]),
        (P2Weighting(gamma=0.5), [1.01**-0.5, 2**-0.5, 5**-0.5, 101**-0.5]),
        (P2Weighting(gamma=0.0), [1, 1, 1, 1]),
        (SoftMinSNRWeighting(), [4 / 4.01, 0.8, 0.5, 4 / 104]),
        (MinSNRWeighting(4.0), [1, 1, 1, 0.04]),
    ],
)
@pytest.mark.parametrize("schedule", [EDM(), VP()], ids=["EDM", "VP"])
def test_weights_on_epsilon_at_known_snr(weighting, on_epsilon, schedule):
    t = schedule.time(SNR**-0.5)
    found = weighting(schedule, t) / SNR
    torch.testing.assert_close(found, torch.tensor(on_epsilon, dtype=WIDE))


def test_soft_min_snr_is_k_diffusions_weight_on_the_raw_network():
    sigma = torch.tensor([0.01, 0.3, 0.5, 7.0], dtype=WIDE)
    b = prediction("edm", EDM(), sigma, 0.5).b
    expected = (sigma * 0.5) ** 2 / (sigma**2 + 0.25) ** 2
    torch.testing.assert_close(SoftMinSNRWeighting()(EDM(), sigma) * b**2, expected)


def test_uncertainty_weights_make_every_noise_level_count_alike(schedule):
    levels = torch.logspace(-2, 1.5, 30, dtype=WIDE)
    errors = 0.3 * levels**2 / (0.2 + levels**2)
    weighting = UncertaintyWeighting(levels.tolist(), errors.tolist())
    found = weighting(schedule, schedule.time(levels)) * errors
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-6, atol=0)
    between = (levels[:-1] * levels[1:]).sqrt()
    loss = weighting(schedule, schedule.time(between)) * 0.3 * between**2 / (0.2 + between**2)
    torch.testing.assert_close(loss, torch.ones_like(loss), rtol=0.02, atol=0)


def test_what_changes_the_objective_says_so():
    changing = [
        *DENSITIES,
        Shifted(LogitNormal(), 3.0),
        P2Weighting(),
        SoftMinSNRWeighting(),
        MinSNRWeighting(),
        LogNormalWeighting(),
        UncertaintyWeighting(LEVELS, LEVELS),
        TotalWeighting(LEVELS, LEVELS, LogNormal()),
    ]
    for each in changing:
        assert "changes the objective" in repr(each)
    for each in (Uniform(), LogNormal(), LogitNormal(), Shifted(Uniform()), UnitWeighting()):
        assert "changes the objective" not in repr(each)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Beta(0.0, 1.0), "`a` must be positive and finite, got 0.0"),
        (lambda: Beta(1.0, math.inf), "`b` must be positive and finite, got inf"),
        (lambda: Asymmetric(1.5), "`turn` must lie between `low` and `high`, got 0.0, 1.5 and 1.0"),
        (lambda: Asymmetric(0.5, 0.0), "`factor` must be positive and finite"),
        (lambda: SoftMinSNRWeighting(0.0), "`gamma` must be positive"),
        (lambda: P2Weighting(0.0), "`k` must be positive"),
        (lambda: P2Weighting(gamma=-1.0), "`gamma` must be at least 0"),
        (lambda: NoiseLevelDensity(EDM(), [1, 0.5], [1, 1]), "increasing positive .*got .1, 0.5"),
        (lambda: NoiseLevelDensity(EDM(), [0.5, 1], [1]), "of 0 or more for each of the 2"),
        (lambda: NoiseLevelDensity(EDM(), [0.5, 1], [0, 0]), "not all 0, got .0, 0"),
        (lambda: EntropyRate(EDM(), [0.5, 1], [1, math.nan]), "finite number of 0 or more"),
        (lambda: UncertaintyWeighting([0.5, 1], [1, 0]), "`errors` must be positive"),
    ],
)
def test_invalid_settings_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build()
