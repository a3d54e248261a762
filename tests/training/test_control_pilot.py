"""The pilot that fits a Taylor control variate while a module trains."""

import itertools
import logging
import math
import random
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy
import pytest
import torch
from lightning.pytorch import Callback
from support.covering_arrays import covering_array
from support.networks import Normalised, small_mlp
from support.points import Points, normal_points
from support.trainers import quiet_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_vr import (
    CARV,
    Clean,
    Cosine,
    DiffusionModule,
    LogUniform,
    ResidualMLP,
    TaylorCV,
    Uniform,
    UnitWeighting,
)
from lightning_vr.core.rng import generator
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.estimators.taylor.coefficients import Cost, PilotStatistics
from lightning_vr.estimators.taylor.terms import taylor_terms
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.training import control_measurement
from lightning_vr.training.control_measurement import ControlMeasurement
from lightning_vr.training.control_pilot import ControlPilot

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    # torch 2.13 loads its forward-mode derivatives with it, nothing of ours
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]

WIDE = torch.float64


POINTS = Points(normal_points(64, "points"))


def module(control=None, network=None, **options):
    network = small_mlp(std=0.3) if network is None else network
    options.setdefault("timesteps", LogUniform(0.01, 10.0))
    options.setdefault("optimizer", lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    return DiffusionModule(network, control_variate=control, **options)


def fit(model, steps=4, ckpt_path=None, batch_size=16, **options):
    torch.manual_seed(3)
    trainer = quiet_trainer(max_steps=steps, **options)
    loader = DataLoader(POINTS, batch_size=batch_size)
    trainer.fit(model, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.network.parameters()).detach()


@pytest.fixture
def costing(monkeypatch):
    """Set what a control variate costs, of a step that takes a second."""

    def be(fixed, marginal):
        found = Cost(fixed, marginal), 1.0, 8.0
        monkeypatch.setattr(ControlMeasurement, "cost", lambda *_: found)

    return be


def findings(bins=8, parts=1, reduction=0.0):
    """What is found where all coefficients are to be one, and take off a share of each bin."""
    share = torch.full((bins,), 1 / bins, dtype=WIDE)
    products = (reduction * share)[:, None].expand(bins, parts) / parts
    return PilotStatistics(
        products, torch.diag_embed(products), share / 2, torch.tensor(1.0, dtype=WIDE), *[share] * 3
    )


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("gate", ["open", (0.1, 1.0)], ids=str)
def test_in_bfloat16_coefficients_are_nearly_those_of_float32(order, gate):
    found = []
    for precision in ("bf16-mixed", "32-true"):
        control = TaylorCV(order, bins=2, gate=gate, refit_every_n_steps=1)
        model = module(control)
        fit(model, steps=2, precision=precision)
        assert model.estimate.control.dtype == torch.float32
        found.append(control.fit.coefficients)
    torch.testing.assert_close(*found, rtol=0, atol=0.15)


class Constant(nn.Module):
    """Says the same at all points: the loss is quadratic in what it says, and all is known."""

    def __init__(self, value=0.5):
        super().__init__()
        self.w = nn.Parameter(torch.full((2,), value))

    def forward(self, x, t):
        return self.w + 0 * x


def constant_module(control, **options):
    """``v = α z - σ x0`` with α² + σ² = 1 at times that are uniform."""
    options |= {"schedule": Cosine(), "timesteps": Uniform(0, 1), "weighting": UnitWeighting("v")}
    return module(control, Constant(), prediction="v", **options)


SIZES = {"samples": [6, 40], "resamples": [1, 2], "accumulated": [1, 2, 3]}
PAIRS_OF_SIZES = [tuple(row.values()) for row in covering_array(SIZES, 2, lambda row: True)]


@pytest.mark.parametrize(tuple(SIZES), PAIRS_OF_SIZES)
def test_what_a_pilot_finds_is_the_closed_form(samples, resamples, accumulated, z_score):
    check_findings(samples, resamples, accumulated, z_score)


@pytest.mark.slow
@pytest.mark.parametrize(tuple(SIZES), list(itertools.product(*SIZES.values())))
def test_in_all_sizes_what_a_pilot_finds_is_the_closed_form(
    samples, resamples, accumulated, z_score
):
    check_findings(samples, resamples, accumulated, z_score)


def check_findings(samples, resamples, accumulated, z_score):
    """Of w - v, the gradient of a draw up to ``2 / d = 1``, and of -α z, that of its odd term."""
    model = constant_module(TaylorCV(bins=2), draws=CARV(resamples, scope="none"))
    model._trainer = quiet_trainer(accumulate_grad_batches=accumulated)
    pilot = ControlMeasurement(model, model.control_variate, RunContext.of(model.trainer))
    found = []
    for i in range(50):
        clean = Clean(torch.randn(samples, 2, generator=generator("x", i)))
        found.append(pilot.measure(clean, lambda *key, i=i: generator(i, *key)))
    found = PilotStatistics(*(torch.stack(x) for x in zip(*found, strict=True)))
    in_step = samples * accumulated * resamples
    for b, square in enumerate((0.5 + 1 / math.pi, 0.5 - 1 / math.pi)):
        # of half of the draws, in two dimensions
        expected = 0.5 * 2 * square / in_step
        assert abs(z_score(found.products[:, b, 0], expected)) < 4
        assert abs(z_score(found.squares[:, b, 0, 0], expected)) < 4
        # which is all of what the noise adds
        assert abs(z_score(found.loss_squares[:, b], expected)) < 4
        assert abs(z_score(found.fraction[:, b], 0.5)) < 4
    # two draws of one sample have it in common, at scales σ of their own
    common = (2 / math.pi) ** 2 * (resamples - 1)
    expected = 0.5 + 2 * (1 + common) / in_step
    assert abs(z_score(found.second_moment, expected)) < 4


@pytest.mark.parametrize("order", [0, 1, 2])
def test_coefficients_are_those_of_gradients_by_plain_autograd(order):
    """Of the same draws: each time with two noises, and the difference of their gradients."""
    control = TaylorCV(order, bins=2, gate="open", refit_every_n_steps=5)
    model = module(control)
    fit(model, steps=1)

    reference = module(TaylorCV(order, bins=2))
    reference.seed = model.seed
    x0 = POINTS.x0[:16]
    parameters = list(reference.parameters())
    sums = torch.zeros(2, 1 + control.parts, sum(p.numel() for p in parameters), dtype=WIDE)

    def source(*key):
        return reference.generator("control variate", 0, "pairs", 0, *key)

    for number, sign in enumerate((1.0, -1.0)):
        times = reference.draws.times(Clean(x0), reference.objective, source("times"))
        noised, target = reference.draw(Clean(x0), source("noise", number), times)
        loss = diffusion_loss(reference.predict, noised, target, reference.objective).per_draw
        terms = taylor_terms(reference.predict, noised, reference.objective, order)
        bins = (noised.sigma.log10() + 2 >= 1.5).long()
        for row, b in enumerate(bins.tolist()):
            for k, value in enumerate([loss[row], *terms[row]]):
                g = torch.autograd.grad(value, parameters, retain_graph=True)
                sums[b, k] += sign * torch.cat([x.flatten() for x in g])

    assert control.fit.coefficients.shape == (2, control.parts)
    for b in range(2):
        g, *c = sums[b]
        expected = torch.linalg.lstsq(torch.stack(c, dim=1), g[:, None]).solution[:, 0]
        torch.testing.assert_close(control.fit.coefficients[b], expected, rtol=1e-3, atol=1e-3)


class Reads(TorchDispatchMode):
    """Counts where single numbers are read, as a device makes the host wait for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def test_numbers_that_a_pilot_reads_are_not_more_for_more_parameters():
    counts = []
    for depth in (1, 4):
        control = TaylorCV(1, bins=2, gate="open")
        model = module(control, ResidualMLP(2, width=8, depth=depth))
        model._trainer = quiet_trainer()
        with Reads() as reads:
            ControlMeasurement(model, control, RunContext.of(model.trainer)).measure(
                Clean(POINTS.x0), generator
            )
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_the_time_of_a_pilot_is_that_of_all_it_does(monkeypatch):
    """Also of inner products, which here take much longer than the passes."""
    inner_products, calls = control_measurement._product_in_order, []

    def slow(*gradients):
        time.sleep(0.02)
        calls.append(gradients)
        return inner_products(*gradients)

    monkeypatch.setattr(control_measurement, "_product_in_order", slow)
    control = TaylorCV(bins=2, gate="open")
    model = module(control)
    model._trainer = quiet_trainer()
    measurement = ControlMeasurement(model, control, RunContext.of(model.trainer))
    start = time.perf_counter()
    measurement.measure(Clean(POINTS.x0), generator)
    taken = time.perf_counter() - start
    assert 0.02 * len(calls) <= sum(measurement.seconds) <= taken
    assert min(measurement.seconds) >= 0.02 * len(calls) / len(measurement.seconds)


def test_a_coefficient_comes_out_without_error_where_the_noise_is_explained_fully():
    control = TaylorCV(bins=4, gate="open", refit_every_n_steps=1)
    fit(constant_module(control), steps=3)
    torch.testing.assert_close(
        control.fit.coefficients, torch.ones(4, 1, dtype=WIDE), rtol=1e-4, atol=0
    )


def test_a_part_without_any_gradient_has_coefficient_0():
    """Of a network that says the same everywhere there is no slope."""
    control = TaylorCV(1, bins=2, gate="open", refit_every_n_steps=1)
    fit(constant_module(control), steps=2)
    assert not control.fit.coefficients[..., 1].any()
    assert float((control.fit.coefficients[..., 0] - 1).abs().max()) < 1e-4


class States(Callback):
    """Keeps the global random states and whether gradients were there before the step."""

    def __init__(self):
        self.found = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        states = torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())
        self.found.append((states, weights(module).tolist()))


class Noisy(nn.Module):
    """Takes global random numbers in training."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout(0.3)

    def forward(self, x, t):
        return self.linear(self.dropout(torch.tanh(x)))


@pytest.mark.parametrize("kind", [None, Noisy])
@pytest.mark.parametrize(
    "options", [{}, {"order": 2}, {"order": 1, "expectation": "rademacher"}], ids=str
)
def test_a_pilot_does_not_disturb_training(costing, options, kind):
    """With the gate closed all is, bit by bit, as without a control variate."""
    costing(5.0, 5.0)
    found = []
    for control in (TaylorCV(refit_every_n_steps=1, bins=2, **options), None):
        states = States()
        model = module(control, kind and kind())
        fit(model, callbacks=[states])
        found.append((states.found, weights(model).tolist()))
        if control is not None:
            assert control.pilot["count"] == 4
            assert not torch.equal(control.fit.coefficients, torch.ones(2, 1, dtype=WIDE))
            assert not control.fit.is_open.any()
    assert found[0] == found[1]


class Counting(nn.Module):
    """Keeps the number of its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t):
        self.calls += 1
        return torch.tanh(self.linear(x))


def test_a_pilot_does_not_change_buffers(costing):
    control = TaylorCV(bins=2, gate="open", refit_every_n_steps=1)
    model = module(control, Counting())
    fit(model, steps=4)
    assert control.pilot["count"] == 4
    assert model.network.calls == 4


def test_timing_and_pilots_meet_no_gradients_of_parameters():
    class Seen(Callback):
        def on_before_backward(self, trainer, module, loss):
            assert all(p.grad is None for p in module.parameters())

    control = TaylorCV(bins=2, refit_every_n_steps=1)
    fit(module(control), callbacks=[Seen()])
    assert control.pilot["seconds"] > 0


@pytest.mark.parametrize("options", [{}, {"order": 1}], ids=str)
def test_a_resumed_run_goes_on_bit_by_bit(tmp_path, options):
    def control():
        return TaylorCV(bins=2, gate="open", refit_every_n_steps=3, **options)

    stopped, resumed, whole = (module(control()) for _ in range(3))
    fit(stopped, -1, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    fit(resumed, -1, tmp_path / "a.ckpt", max_epochs=3)
    fit(whole, -1, max_epochs=3)
    assert torch.equal(weights(resumed), weights(whole))
    found = resumed.control_variate.get_extra_state()
    assert found == whole.control_variate.get_extra_state()
    assert found["pilot"]["count"] == 4
    assert not torch.equal(weights(stopped), weights(whole))


def test_pilots_are_so_many_steps_apart():
    control = TaylorCV(bins=2, gate="open", refit_every_n_steps=3)
    fit(module(control), steps=8)
    assert control.pilot["count"] == 3
    assert control.pilot["next"] == 9


def test_accumulated_batches_are_one_step(costing):
    costing(0.0, 0.1)
    control = TaylorCV(bins=2, refit_every_n_steps=1)
    fit(module(control), steps=4, accumulate_grad_batches=2)
    assert control.pilot["count"] == 4


@pytest.mark.parametrize("gate", ["open", (0.1, 1.0)], ids=str)
def test_with_nothing_to_learn_nothing_is_measured(monkeypatch, gate):
    for name in ("measure", "cost"):
        monkeypatch.setattr(ControlMeasurement, name, lambda *_: pytest.fail("was measured"))
    control = TaylorCV(gate=gate, coefficient=0.5)
    fit(module(control))
    assert control.pilot is None


def untrained(control):
    """Of what it regresses on at low noise, all is noise, and at high noise the sample."""
    return module(control, ResidualMLP(2, width=8, depth=1), timesteps=LogUniform(0.001, 1000.0))


def test_what_is_fitted_is_what_training_takes(costing):
    """Gate and coefficients of the pilot before the step are those of its loss."""
    costing(0.0, 0.1)
    control = TaylorCV(bins=4, refit_every_n_steps=1)
    model = untrained(control)
    model.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    fit(model, steps=2)
    assert 0 < int(control.fit.is_open.sum()) < 4
    noised = model.estimate.noised
    terms = taylor_terms(model.predict, noised, model.objective, 0)[:, 0]
    bins = control.bin(noised.t, model.objective)
    beta = control.fit.coefficients[:, 0] * control.fit.is_open
    torch.testing.assert_close(model.estimate.control, -(beta[bins] * terms).float().detach())
    assert not model.estimate.control.requires_grad


def test_the_gate_opens_where_it_pays_and_says_so(costing, caplog):
    costing(0.0, 0.1)
    control = TaylorCV(bins=4, refit_every_n_steps=1)
    with caplog.at_level(logging.INFO):
        fit(untrained(control), steps=3)
    is_open = control.fit.is_open
    assert is_open[0]
    assert not is_open[-1]
    # in the middle of bins of one and a half decades each
    names = ["0.0056", "0.18", "5.6", "180"]
    levels = ", ".join(name for name, x in zip(names, is_open.tolist(), strict=True) if x)
    # what fits take is part of the price
    assert (
        f"on in {int(is_open.sum())} of 4 bins of the noise level, around s = {levels}: for all "
        f"draws it makes a step 1.15 times as long" in caplog.text
    )
    assert control.fit.predicted_speedup > 1.1


def test_the_gate_stays_closed_where_it_costs_more_than_it_brings(costing, caplog):
    costing(5.0, 5.0)
    control = TaylorCV(bins=4, refit_every_n_steps=1)
    model = untrained(control)
    with caplog.at_level(logging.INFO):
        fit(model, steps=3)
    assert control.is_closed
    assert "off in all 4 bins of the noise level" in caplog.text
    assert "for all draws it makes a step 11.05 times as long" in caplog.text
    # said once, and not in each of three pilots
    assert caplog.text.count("TaylorCV at step") == 1
    assert not model.estimate.control.any()


def test_what_it_costs_is_timed_and_an_order_more_costs_more():
    found = {}
    for order in (0, 2):
        control = TaylorCV(order, bins=2, refit_every_n_steps=10)
        fit(module(control, ResidualMLP(2, width=64, depth=2)), steps=1, batch_size=64)
        found[order] = sum(control.fit.cost)
        assert control.pilot["seconds"] > 0
        assert control.pilot["spent"] > 3
    assert found[0] < found[2]


@pytest.mark.parametrize("gate", ["auto", "open"])
@pytest.mark.parametrize("options", [{}, {"order": 1}], ids=str)
def test_what_was_fitted_is_logged_by_name(costing, gate, options):
    costing(0.0, 0.1)
    control = TaylorCV(bins=2, gate=gate, refit_every_n_steps=1, **options)
    model = module(control)
    metrics = fit(model, steps=1).callback_metrics
    # the middles of the halves of three decades
    levels = ["0.056", "1.8"]
    parts = ["odd", "even"][: control.parts]
    expected = {f"control_variate/{x}/s{s}" for x in parts for s in levels}
    expected |= {f"control_variate/{x}/s{s}" for x in ("open", "reduction") for s in levels}
    expected |= {"control_variate/reduction"}
    if gate == "auto":
        expected |= {"control_variate/saving", "control_variate/share"}
    assert {name for name in metrics if name.startswith("control_variate")} == expected
    betas = control.fit.coefficients
    assert float(metrics["control_variate/odd/s1.8"]) == pytest.approx(float(betas[1, 0]), rel=1e-5)


@pytest.fixture
def run_of(monkeypatch):
    """Let a pilot live through a run of steps without any training, and return its states."""

    def run(control, steps, pilot_seconds=3.0, reduction=0.0, up_to=None):
        def measure(measurement, clean, source):
            measurement.seconds = [pilot_seconds / 10] * 10
            return findings(control.bins, reduction=reduction)

        monkeypatch.setattr(ControlMeasurement, "measure", measure)
        model = module(control)
        model._trainer = SimpleNamespace(
            estimated_stepping_batches=steps,
            global_step=0,
            sanity_checking=False,
            is_global_zero=True,
            loggers=[],
            callback_metrics={},
            accumulate_grad_batches=1,
            precision_plugin=SimpleNamespace(forward_context=nullcontext),
        )
        pilot, seen = ControlPilot(model, control, RunContext.of(model.trainer)), []
        for step in range(up_to or int(steps)):
            model._trainer.global_step = step
            before = control.pilot and dict(control.pilot)
            pilot.before_step(torch.zeros(2, 2))
            if control.pilot != before:
                seen.append((step, dict(control.pilot)))
        return seen

    return run


@pytest.mark.parametrize("reduction", [0.0, 0.5])
@pytest.mark.parametrize("pilot_seconds", [1.0, 6.0, 40.0])
@pytest.mark.parametrize("steps", [900, 5000, 12_000])
def test_fits_take_a_small_share_of_the_time(run_of, costing, steps, pilot_seconds, reduction):
    costing(0.0, 0.1)
    control = TaylorCV()
    seen = run_of(control, steps, pilot_seconds, reduction)
    assert control.is_closed == (reduction == 0)
    share = 0.02 if control.is_closed else 0.05
    for step, pilot in seen:
        # half of it may be spent in advance; the first pilot alone is not known to be so long
        allowed = share * (step + steps) / 2
        assert pilot["spent"] <= (allowed if pilot["count"] > 1 else allowed + pilot_seconds)
    _, last = seen[-1]
    assert last["spent"] == pytest.approx(8.0 + last["count"] * pilot_seconds)
    if last["count"] > 3:
        assert 0.3 * share * steps < last["spent"] <= share * steps


def test_fits_are_dense_at_first_and_even_later(run_of, costing):
    costing(0.0, 0.1)
    steps = [step for step, _ in run_of(TaylorCV(), 30_000, 6.0)]
    assert steps[:6] == [0, 1, 2, 4, 8, 16]
    apart = [b - a for a, b in zip(steps[-20:], steps[-19:], strict=False)]
    # half of the share pays for a pilot in so many steps
    assert max(apart) == min(apart) == 6.0 / (0.02 / 2)


def test_a_run_without_an_end_is_fitted_on_and_on(run_of, costing):
    costing(0.0, 0.1)
    seen = run_of(TaylorCV(), math.inf, 6.0, up_to=40_000)
    assert seen[0][0] == 0
    assert seen[-1][0] > 39_000
    assert 0.005 * 40_000 < seen[-1][1]["spent"] <= 0.02 * 40_000


def test_a_run_that_is_too_short_says_so_and_trains_plainly(run_of, costing, caplog):
    costing(0.0, 20.0)
    control = TaylorCV()
    with caplog.at_level(logging.INFO):
        seen = run_of(control, 900)
    assert [pilot["count"] for _, pilot in seen] == [0]
    assert "TaylorCV is not fitted" in caplog.text
    assert "900 steps is too little" in caplog.text
    assert "et `refit_every_n_steps`" in caplog.text
    assert control.is_closed


@pytest.mark.parametrize("steps", [10, 300])
def test_a_run_that_is_too_short_for_timing_says_so(run_of, costing, caplog, steps):
    costing(0.0, 0.1)
    with caplog.at_level(logging.INFO):
        assert run_of(TaylorCV(), steps) == []
    assert "TaylorCV is not fitted" in caplog.text
    assert f"{steps} steps is too little" in caplog.text


def test_a_gate_that_becomes_automatic_in_mid_run_still_opens(run_of, costing):
    """A checkpoint of a run with an open gate knows coefficients, and no cost."""
    costing(0.0, 0.1)
    control = TaylorCV(gate="open", refit_every_n_steps=5)
    run_of(control, 20, reduction=0.5)
    again = TaylorCV(refit_every_n_steps=5)
    again.set_extra_state(control.get_extra_state())
    run_of(again, 50, reduction=0.5)
    assert again.fit.is_open.all()


def test_a_cadence_that_is_left_out_in_mid_run_does_not_fit_in_every_step(run_of, costing):
    costing(0.0, 0.1)
    control = TaylorCV(gate="open", refit_every_n_steps=5)
    run_of(control, 20)
    again = TaylorCV(gate="open")
    again.set_extra_state(control.get_extra_state())
    run_of(again, 500)
    assert again.pilot["count"] < 30


class WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, t):
        return WithoutForwardMode.apply(self.linear(x))


@pytest.mark.parametrize("gate", ["auto", "open"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_network_without_forward_mode_derivatives_is_refused_before_the_first_step(order, gate):
    model = module(TaylorCV(order, gate=gate), Custom())
    before = weights(model)
    message = f"of order {order} needs forward-mode derivatives .* Custom has none .*use order=0"
    with pytest.raises(ValueError, match=message):
        fit(model)
    assert torch.equal(weights(model), before)


def test_order_0_needs_no_forward_mode_derivatives():
    control = TaylorCV(bins=2, gate="open", refit_every_n_steps=1)
    model = module(control, Custom())
    fit(model)
    assert control.pilot["count"] == 4


def test_batch_normalisation_is_refused_when_the_module_is_built():
    with pytest.raises(
        ValueError, match=r"`control_variate` .* but the network's `norm` is a Batch"
    ):
        module(TaylorCV(), Normalised(nn.BatchNorm1d))
    module(None, Normalised(nn.BatchNorm1d))
    module(TaylorCV(), Normalised(nn.LayerNorm))


@pytest.mark.parametrize("order", [0, 1])
def test_validation_is_on_the_plain_loss(order):
    found = []
    for control in (TaylorCV(order, gate="open", coefficient=1.0), None):
        torch.manual_seed(3)
        trainer = quiet_trainer()
        (metrics,) = trainer.validate(module(control), DataLoader(POINTS, 16), verbose=False)
        found.append(metrics["val/loss"])
    assert found[0] == found[1]
