"""Solvers against the exact denoiser of a Gaussian mixture."""

import functools
import math
from itertools import pairwise

import diffusers
import pytest
import torch
from support.denoisers import MIXTURE, gaussian_denoiser, mixture_denoiser

from lightning_vr.core.rng import generator
from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.schedules import EDM, VE, VP, RectifiedFlow
from lightning_vr.process.solvers import (
    DDIM,
    RK45,
    Ancestral,
    DPMSolver2M,
    EDMStochastic,
    Euler,
    Heun,
    PredictorCorrector,
    Problem,
)
from lightning_vr.process.solvers.row_noise import BLOCK

LOW, HIGH = 0.02, 30.0
SUM_OF_ERRORS = 25
"""Errors of all steps of RK45 together, in tolerances: about ten steps, u of up to 2.5."""
ENDS = {"grid": "exponential", "noise_level_min": LOW, "noise_level_max": HIGH}
DETERMINISTIC = [Euler(), Heun(), DPMSolver2M()]
STOCHASTIC = [
    DDIM(eta=1.0),
    Ancestral(),
    EDMStochastic(noise_level_min=0.0),
    PredictorCorrector(snr=0.1),
]
FIXED = [*DETERMINISTIC, *STOCHASTIC, DDIM(eta=0.5), Ancestral(0.3), PredictorCorrector(2)]


def name(solver):
    return type(solver).__name__


def normal(source, count, dtype=torch.float64):
    return torch.randn(count, 1, generator=source, dtype=dtype)


@functools.cache
def found_by_rk45(schedule):
    fine = Sampler(RK45(1e-10, 1e-10), noise_level_min=LOW, noise_level_max=HIGH)
    return fine.solve(
        mixture_denoiser(schedule), schedule, normal(torch.Generator().manual_seed(0), 8)
    )


@pytest.mark.parametrize("schedule", [EDM(), VP(), RectifiedFlow()], ids=name)
@pytest.mark.parametrize(
    ("solver", "order"), [(Euler(), 1), (Heun(), 2), (DPMSolver2M(), 2), (Ancestral(eta=0.0), 2)]
)
def test_solvers_converge_with_their_order_to_what_rk45_finds(schedule, solver, order, source):
    noise, denoiser = normal(source, 8), mixture_denoiser(schedule)
    reference = found_by_rk45(schedule)
    errors = [
        float((Sampler(solver, steps, **ENDS).solve(denoiser, schedule, noise) - reference).norm())
        for steps in (81, 161)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_rk45_is_within_its_tolerance_in_each_step(schedule, tolerance, source):
    noise, std = normal(source, 64), 0.6
    sampler = Sampler(RK45(tolerance, tolerance), noise_level_min=LOW, noise_level_max=HIGH)
    found = sampler.solve(gaussian_denoiser(schedule, std), schedule, noise)
    # dz/ds = (z - x0_hat) / s has the solution z ∝ sqrt(std² + s²)
    z = HIGH * noise * math.sqrt((std**2 + LOW**2) / (std**2 + HIGH**2))
    exact = std**2 / (std**2 + LOW**2) * z
    assert 0 < float((found - exact).abs().max()) < SUM_OF_ERRORS * tolerance


def test_a_sample_of_rk45_changes_with_its_neighbours_within_the_tolerance(source):
    schedule, tolerance = EDM(), 1e-4
    sampler = Sampler(RK45(tolerance, tolerance))
    denoiser, noise = mixture_denoiser(schedule), normal(source, 300)
    together = sampler.solve(denoiser, schedule, noise)
    alone = sampler.solve(denoiser, schedule, noise[:1])
    assert 0 < float((alone - together[:1]).abs().max()) < SUM_OF_ERRORS * tolerance


@pytest.mark.parametrize("solver", STOCHASTIC, ids=name)
def test_stochastic_solvers_draw_from_the_mixture(schedule, solver, source, z_score):
    steps = 256 if solver.evaluations(2) < 3 or name(solver) == "PredictorCorrector" else 96
    samples = Sampler(solver, steps, **ENDS).solve(
        mixture_denoiser(schedule), schedule, normal(source, 3000), generator=generator("moments")
    )
    mean, variance, weight = MIXTURE.means[:, 0], 0.16, MIXTURE.weights
    truth = [
        weight @ mean,
        weight @ (mean**2 + variance),
        weight @ (mean**3 + 3 * mean * variance),
        weight @ (mean**4 + 6 * mean**2 * variance + 3 * variance**2),
    ]
    for power, expected in enumerate(truth, start=1):
        assert abs(z_score(samples[:, 0] ** power, expected)) < 3


def test_ddim_without_noise_is_euler(schedule, source):
    noise, denoiser = normal(source, 8), mixture_denoiser(schedule)
    found = [Sampler(x, 12).solve(denoiser, schedule, noise) for x in (DDIM(eta=0.0), Euler())]
    assert torch.equal(*found)


def test_ancestral_without_noise_or_churn_is_deterministic(schedule, source):
    noise, denoiser = normal(source, 8), mixture_denoiser(schedule)
    heun, churned = (
        Sampler(x, 12).solve(denoiser, schedule, noise) for x in (Heun(), EDMStochastic(churn=0.0))
    )
    assert torch.equal(heun, churned)
    state = torch.get_rng_state()
    Sampler(Ancestral(eta=0.0), 12).solve(denoiser, schedule, noise)
    assert torch.equal(torch.get_rng_state(), state)


class Recorded:
    """A generator's noise in the order in which a solver gets it, once more for a formula."""

    def __init__(self, monkeypatch):
        self.drawn = []
        own = torch.randn

        def randn(*args, **options):
            self.drawn.append(own(*args, **options))
            return self.drawn[-1]

        monkeypatch.setattr(torch, "randn", randn)

    def next(self, count):
        return self.drawn.pop(0)[:count].double()


@pytest.fixture
def recorded(monkeypatch):
    return Recorded(monkeypatch)


def grid(schedule, solver, steps=6):
    sampler = Sampler(solver, steps, noise_level_min=0.05, noise_level_max=20.0)
    return sampler, sampler.noise_levels(schedule)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_is_equations_12_and_16_of_song(eta, source, recorded):
    schedule, noise = VP(), normal(source, 5)
    recorded.drawn.clear()
    sampler, levels = grid(schedule, DDIM(eta))
    found = sampler.solve(mixture_denoiser(schedule), schedule, noise, generator=generator(1))

    times = schedule.time(levels)
    x = schedule.sigma(times[0]) * noise
    for now, after in pairwise(times):
        kept, kept_after = schedule.alpha(now) ** 2, schedule.alpha(after) ** 2
        x0 = mixture_denoiser(schedule)(x, now.expand(5))
        epsilon = (x - kept.sqrt() * x0) / (1 - kept).sqrt()
        std = eta * ((1 - kept_after) / (1 - kept) * (1 - kept / kept_after)).sqrt()
        direction = (1 - kept_after - std**2).sqrt() * epsilon
        x = kept_after.sqrt() * x0 + direction + std * recorded.next(5)
    torch.testing.assert_close(found, mixture_denoiser(schedule)(x, times[-1].expand(5)))


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of diffusers, on numpy 2
def test_euler_ancestral_of_diffusers_is_ddim_with_all_noise(source):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    schedule, noise, steps = DiffusersSchedule(scheduler), normal(source, 5), 6
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    denoiser, drawn = mixture_denoiser(schedule), []

    x = sigmas[0] * noise
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        x0 = denoiser(x / (1 + sigmas[i] ** 2).sqrt(), schedule.time(sigmas[i]).expand(5))
        state = source.get_state()
        x_next = scheduler.step((x - x0) / sigmas[i], t, x, generator=source).prev_sample
        source.set_state(state)
        drawn.append(torch.randn(5, 1, generator=source, dtype=torch.float64))
        x = x_next

    class Replayed:
        def like(self, z):
            return drawn.pop(0)

    levels = tuple(sigmas[:-1].tolist())
    problem = Problem(denoiser, schedule, steps, levels, Replayed(), torch.float64, None)
    torch.testing.assert_close(DDIM(1.0).solve(problem, noise), x, rtol=1e-5, atol=1e-5)


def test_edm_stochastic_is_algorithm_2_of_karras(source, recorded):
    schedule, noise = EDM(), normal(source, 5)
    solver = EDMStochastic(churn=2.0, noise_level_min=0.1, noise_level_max=15.0, noise_scale=1.01)
    recorded.drawn.clear()
    sampler, levels = grid(schedule, solver)
    found = sampler.solve(mixture_denoiser(schedule), schedule, noise, generator=generator(1))

    def slope(x, t):
        return (x - mixture_denoiser(schedule)(x, t.expand(5))) / t

    x, t = levels[0] * noise, [*levels, torch.zeros(())]
    for now, after in pairwise(t):
        gamma = min(2.0 / 6, 2**0.5 - 1) if 0.1 <= now <= 15.0 else 0.0
        raised = now * (1 + gamma)
        if gamma > 0:
            x = x + (raised**2 - now**2).sqrt() * 1.01 * recorded.next(5)
        d = slope(x, raised)
        x_next = x + (after - raised) * d
        if after > 0:
            x_next = x + (after - raised) * (d + slope(x_next, after)) / 2
        x = x_next
    torch.testing.assert_close(found, x)


def test_a_corrector_moves_along_the_score_of_the_noised_mixture(source, recorded):
    schedule, noise, r = VE(), normal(source, 5), 0.2
    recorded.drawn.clear()
    sampler, levels = grid(schedule, PredictorCorrector(corrector_steps=2, snr=r))
    found = sampler.solve(mixture_denoiser(schedule), schedule, noise, generator=generator(1))

    z = levels[0] * noise
    for s, end in pairwise(levels):
        x0 = MIXTURE.posterior_mean(z, 1.0, s)
        ratio = end**2 / s**2  # the posterior q(z' | z, x0) of the variance-exploding process
        z = x0 + ratio * (z - x0) + end * (1 - ratio).sqrt() * recorded.next(5)
        for _ in range(2):
            size = 2 * (r * end) ** 2
            z = z + size * MIXTURE.score(z, 1.0, end) + (2 * size).sqrt() * recorded.next(5)
    torch.testing.assert_close(found, MIXTURE.posterior_mean(z, 1.0, levels[-1]))


def test_of_a_linear_denoiser_a_step_of_dpm_solver_is_exact_in_log_s():
    schedule, levels = EDM(), [8.0, 4.0, 2.0, 1.0]

    def denoiser(xt, t):  # x0_hat that is linear in -log s, whatever the state
        return -torch.log(t)[:, None].expand_as(xt)

    noise = torch.ones(1, 1, dtype=torch.float64)
    z = 8.0 * noise
    for i, (s, end) in enumerate(pairwise(levels)):
        h, middle = math.log(s / end), -math.log(s)
        middle += h / 2 if i > 0 else 0.0  # the line through two estimates, at half of the step
        z = end / s * z + (1 - end / s) * middle
    seen = []
    sampler = Sampler(DPMSolver2M(), grid=levels)
    found = sampler.solve(lambda x, t: seen.append(x) or denoiser(x, t), schedule, noise)
    torch.testing.assert_close(seen[-1], z)
    torch.testing.assert_close(found, torch.zeros_like(found))


@pytest.mark.parametrize("solver", [*FIXED, RK45()], ids=repr)
def test_all_solvers_run_on_all_schedules_within_their_bounds_and_count(schedule, solver, source):
    calls = []

    def denoiser(xt, t):
        assert xt.dtype == t.dtype == torch.float32
        calls.append(float(t[0]))
        return gaussian_denoiser(schedule, 0.5)(xt, t)

    sampler = Sampler(solver)
    drawn = sampler.draw(
        lambda xt, t, group, cond: denoiser(xt, t), schedule, normal(source, 4, torch.float32)
    )
    assert drawn.x0.isfinite().all()
    assert drawn.x0.dtype == torch.float32
    assert drawn.evaluations == len(calls)
    assert sampler.evaluations == (None if isinstance(solver, RK45) else len(calls))
    assert min(calls) >= schedule.t_min - 1e-5
    assert max(calls) <= schedule.t_max + 1e-5 * schedule.t_max


@pytest.mark.parametrize("solver", STOCHASTIC, ids=name)
def test_the_same_generator_gives_the_same_samples_at_any_batch_size(solver, source):
    schedule, count = VP(), 2 * BLOCK + 9
    noise = normal(source, count, torch.float32)

    def draw(seed, batch_size):
        return Sampler(solver, 4).draw(
            lambda xt, t, group, cond: mixture_denoiser(schedule)(xt, t),
            schedule,
            noise,
            generator=generator(seed),
            batch_size=batch_size,
        )

    whole = draw("a", count).x0
    for batch_size in (1, 50, BLOCK):
        if batch_size > 1 or name(solver) == "DDIM":
            torch.testing.assert_close(draw("a", batch_size).x0, whole, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(draw("b", count).x0, whole)
    assert draw("a", 50).evaluations == solver.evaluations(4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DDIM(eta=1.5), "`eta` must be between 0 and 1, got 1.5"),
        (lambda: Ancestral(eta=-0.1), "`eta` must be between 0 and 1, got -0.1"),
        (lambda: EDMStochastic(churn=-1.0), "`churn` must be at least 0, got -1"),
        (lambda: EDMStochastic(churn=math.inf), "`churn` must be finite, got inf"),
        (lambda: EDMStochastic(noise_scale=0.0), "`noise_scale` must be positive"),
        (lambda: EDMStochastic(noise_level_min=60.0), "must satisfy 0 <= min < max, got 60 and 50"),
        (lambda: PredictorCorrector(corrector_steps=0), "`corrector_steps` must be at least 1"),
        (lambda: PredictorCorrector(snr=1.0), "`snr` must be below 1, .* got 1.0: use 0.16"),
        (lambda: RK45(rtol=0.0), "`rtol` must be positive"),
        (lambda: RK45(atol=math.nan), "`atol` must be positive"),
        (lambda: Sampler(RK45(), steps=9), "`steps` must be left out with RK45, .* got 9"),
        (lambda: Sampler(RK45(), grid="exponential"), "`grid` must be left out with RK45"),
        (lambda: Sampler("heun"), r"`solver` must be an object .* got 'heun': .*as DDIM\("),
    ],
)
def test_settings_that_cannot_work_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_adaptive_steps_that_find_no_end_say_so():
    def rough(xt, t):
        return 1e12 * xt

    with pytest.raises(ValueError, match=r"^Tolerances must be within .* got rtol=0.1"):
        Sampler(RK45(0.1, 0.1)).solve(rough, EDM(), torch.ones(2, 2))
