"""The Taylor control variate in the loss: where it runs, with which coefficients, without bias."""

import copy
import itertools
import math
import pickle
from dataclasses import replace

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_vr.core.rng import generator
from lightning_vr.core.rows import mapped, tensors
from lightning_vr.core.types import Clean, Noised
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import IID, noise_samples
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import own_sample
from lightning_vr.estimators.taylor.coefficients import Cost, DeviceCopy, PilotStatistics
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.estimators.taylor.terms import constant_term, taylor_terms
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.timesteps import LogUniform
from lightning_vr.training.module import DiffusionModule

# torch 2.13 loads its forward-mode derivatives with it, nothing of ours
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

WIDE = torch.float64
orders = pytest.mark.parametrize("order", [0, 1, 2])


def module(control=None, width=8, dtype=WIDE, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP(2, width=width, depth=1)
        torch.nn.init.normal_(network.project_out.weight)
    options.setdefault("timesteps", LogUniform(0.01, 10.0))
    return DiffusionModule(network, control_variate=control, **options).to(dtype)


def draws_of(model, count=12, key=0):
    source = generator("draws", key)
    x0 = torch.randn(count, 2, generator=source, dtype=WIDE)
    t = IID().times(Clean(x0), model.objective, source).t.double()
    noised = noise_samples(Clean(x0), model.schedule, t, torch.ones_like(t), source)
    if model.control_variate is not None:
        noised = model.control_variate.draw(noised, source)
    return noised


def compute_loss(model, noised, network=None):
    return diffusion_loss(
        network or model.predict,
        noised,
        own_sample(noised),
        model.objective,
        model.control_variate,
    )


def gradient(model, loss):
    parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in parts])


def with_coefficients(control, key=0):
    """Set arbitrary coefficients, far from the fitted ones."""
    shape = (control.bins, control.parts)
    source = generator("coefficients", key)
    control.fit.coefficients = 3 * torch.randn(shape, generator=source, dtype=WIDE) - 1
    return control


class Counted:
    """A network that keeps the number of rows of each of its calls."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __call__(self, x, noised):
        self.rows.append(len(x))
        return self.model.predict(x, noised)


@orders
def test_before_the_first_fit_the_loss_is_the_plain_one(order):
    control = TaylorCV(order)
    plain, controlled = module(), module(control)
    noised = draws_of(plain)
    network = Counted(controlled)
    expected, found = compute_loss(plain, noised), compute_loss(controlled, noised, network)
    assert network.rows == [12]
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(gradient(controlled, found.loss), gradient(plain, expected.loss))
    assert not found.control.any()


@orders
def test_an_open_gate_subtracts_the_terms_from_the_loss_of_all_draws(order):
    control = TaylorCV(order, gate="open", coefficient=0.75)
    plain, controlled = module(), module(control)
    noised = draws_of(plain)
    expected, found = compute_loss(plain, noised), compute_loss(controlled, noised)
    terms = taylor_terms(plain.predict, noised, plain.objective, order).sum(dim=1)
    torch.testing.assert_close(found.control, -0.75 * terms)
    torch.testing.assert_close(found.per_draw, expected.per_draw)
    torch.testing.assert_close(found.loss, (expected.per_draw - 0.75 * terms).mean())
    torch.testing.assert_close(
        gradient(controlled, found.loss),
        gradient(plain, (expected.per_draw - 0.75 * terms).mean()),
    )


@orders
def test_each_bin_and_part_has_its_coefficient(order):
    control = with_coefficients(TaylorCV(order, bins=3, gate="open"))
    model = module(control)
    noised = draws_of(model, 30)
    terms = taylor_terms(model.predict, noised, model.objective, order)
    # noise levels are log-uniform over three orders of magnitude
    bins = (noised.sigma.double().log10() + 2).floor().long()
    assert len(bins.unique()) == 3
    expected = -(control.fit.coefficients[bins] * terms).sum(dim=1)
    torch.testing.assert_close(compute_loss(model, noised).control, expected)


class Copies(TorchDispatchMode):
    """Counts the copies that are made of a control variate's coefficients."""

    def __init__(self, control):
        super().__init__()
        self.control, self.count = control, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_copy = func.overloadpacket.__name__ == "_to_copy"
        self.count += is_copy and args[0] is self.control.fit.coefficients
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gate", ["open", (0.1, 1.0), "auto"], ids=str)
@orders
def test_coefficients_are_copied_to_the_device_once_for_each_fit(order, gate):
    """Times in float32 have them copied on a CPU too."""
    control = with_coefficients(TaylorCV(order, bins=3, gate=gate))
    control.fit.is_open = torch.tensor([True, False, True])
    model = module(control, dtype=torch.float32)
    noised = Noised(**mapped(tensors(draws_of(model, 30)), lambda x: x.float()))
    with Copies(control) as copies:
        for fits in (1, 2):
            found = [compute_loss(model, noised).control for _ in range(3)]
            assert copies.count == fits
            assert found[0].any()
            assert all(torch.equal(x, found[0]) for x in found)
            with_coefficients(control, key=fits)


def test_loaded_coefficients_replace_the_cached_copy():
    control = with_coefficients(TaylorCV(bins=3, gate=(0.1, 1.0)), key=1)
    model = module(control)
    noised = draws_of(model, 30)
    expected, state = compute_loss(model, noised).control, control.get_extra_state()
    with_coefficients(control, key=2)
    assert not torch.equal(compute_loss(model, noised).control, expected)
    control.set_extra_state(state)
    assert torch.equal(compute_loss(model, noised).control, expected)


def test_a_copy_on_a_device_is_cached_for_one_tensor_and_is_not_state():
    first, second = torch.tensor([True, False]), torch.tensor([True, True])
    copies, there = DeviceCopy(), (torch.device("meta"), torch.bool)
    kept = copies.of(first, *there)
    assert kept.device.type == "meta"
    assert copies.of(first, *there) is kept
    assert torch.equal(copies.of(first, torch.device("cpu"), torch.bool), first)
    assert torch.equal(copies.of(second, torch.device("cpu"), torch.bool), second)
    for another in (copy.deepcopy(copies), pickle.loads(pickle.dumps(copies))):
        assert vars(another) == vars(DeviceCopy())


@pytest.mark.parametrize("gate", [(0.1, 1.0), "open"], ids=str)
@orders
def test_samples_may_be_float64_with_times_in_float32(order, gate):
    """Times are float32 whatever the samples are."""
    control = with_coefficients(TaylorCV(order, bins=2, gate=gate))
    model = module(control)
    clean = Clean(torch.randn(12, 2, generator=generator("clean"), dtype=WIDE))
    found = model.loss(clean, generator("loss"))
    assert found.noised.t.dtype == torch.float32
    assert found.control.dtype == WIDE
    assert found.control.any()


@orders
def test_a_window_is_of_noise_levels(order):
    control = TaylorCV(order, gate=(0.1, 1.0), coefficient=1.0)
    model = module(control)
    noised = draws_of(model, 30)
    inside = (noised.sigma >= 0.1) & (noised.sigma <= 1.0)
    assert 5 < int(inside.sum()) < 25
    found = compute_loss(model, noised).control
    assert not found[~inside].any()
    terms = taylor_terms(model.predict, noised, model.objective, order).sum(dim=1)
    torch.testing.assert_close(found[inside], -terms[inside])


@orders
def test_an_automatic_gate_is_of_bins(order):
    control = TaylorCV(order, bins=3)
    control.fit.is_open = torch.tensor([True, False, True])
    model = module(control)
    noised = draws_of(model, 30)
    inside = (noised.sigma < 0.1) | (noised.sigma >= 1.0)
    found = compute_loss(model, noised).control
    assert not found[~inside].any()
    terms = taylor_terms(model.predict, noised, model.objective, order).sum(dim=1)
    torch.testing.assert_close(found[inside], -terms[inside])


@pytest.mark.parametrize("is_open", list(itertools.product([True, False], repeat=3)), ids=str)
def test_order_0_runs_the_network_once_on_the_draws_and_on_those_of_open_bins_again(is_open):
    control = TaylorCV(bins=3)
    control.fit.is_open = torch.tensor(is_open)
    model = module(control)
    noised = draws_of(model, 30)
    network = Counted(model)
    compute_loss(model, noised, network)
    bins = (noised.sigma.double().log10() + 2).floor().long()
    assert network.rows == [30 + int(control.fit.is_open[bins].sum())]


@pytest.mark.parametrize(("order", "rows"), [(1, 2), (2, 3)])
def test_higher_orders_run_the_network_along_all_axes_of_open_bins(order, rows):
    control = TaylorCV(order, bins=3)
    control.fit.is_open = torch.tensor([True, False, False])
    model = module(control)
    noised = draws_of(model, 30)
    network = Counted(model)
    compute_loss(model, noised, network)
    assert network.rows == [30, rows * int((noised.sigma < 0.1).sum())]


def test_bins_are_equally_likely_and_ordered_by_the_time(z_score):
    control = TaylorCV(bins=5)
    model = module(control, timesteps=LogUniform(0.01, 10.0))
    t = draws_of(model, 20_000).t
    bins = control.bin(t, model.objective)
    for b in range(5):
        assert abs(z_score((bins == b).double(), 0.2)) < 4
        assert torch.equal(bins <= b, t.double() < 0.01 * 1000 ** ((b + 1) / 5))
    ends = torch.tensor([0.001, 0.01, 10.0, 100.0])
    assert control.bin(ends, model.objective).tolist() == [0, 0, 4, 4]


def nodes_of_noise(model, t):
    """One sample at each time and all nodes of noise, whose quadrature is exact."""
    nodes, mass = (torch.from_numpy(x) for x in numpy.polynomial.hermite_e.hermegauss(5))
    z = torch.cartesian_prod(nodes, nodes)
    mass = torch.cartesian_prod(mass, mass).prod(dim=1)
    count = len(t)
    x0 = torch.randn(count, 2, generator=generator("x0"), dtype=WIDE)
    t, x0 = t.double().repeat_interleave(25), x0.repeat_interleave(25, dim=0)
    weight = (25 * mass / mass.sum()).repeat(count)
    noised = noise_samples(Clean(x0), model.schedule, t, weight, generator("unused"))
    z = z.repeat(count, 1)
    return replace(noised, noise=z, xt=model.schedule.perturb(x0, z, t))


@pytest.mark.parametrize("gate", ["open", (0.1, 1.0), "auto"], ids=str)
@orders
def test_no_coefficients_change_the_mean_of_the_gradient(order, gate, kind):
    """Over all noise, by quadrature: any bias would show, however small."""
    control = with_coefficients(TaylorCV(order, bins=4, gate=gate))
    control.fit.is_open = torch.tensor([False, True, True, False])
    model = module(control, prediction=kind)
    noised = nodes_of_noise(model, torch.tensor([0.03, 0.2, 0.5, 3.0]))
    found = compute_loss(model, noised)
    if (kind, order) != ("x0", 0):
        assert gradient(model, found.control[51]).norm() > 1e-6
    scale = gradient(model, found.loss).norm()
    assert float(gradient(model, found.control.mean()).abs().max()) < 1e-9 * max(1.0, scale)


@orders
def test_it_does_not_change_the_mean_gradient_of_an_upstream_network(order):
    control = with_coefficients(TaylorCV(order, bins=4, gate="open"))
    model = module(control)
    noised = nodes_of_noise(model, torch.tensor([0.03, 0.2, 0.5, 3.0]))
    shift = torch.zeros(2, dtype=WIDE, requires_grad=True)
    x0 = noised.x0 + shift
    noised = replace(noised, x0=x0, xt=model.schedule.perturb(x0, noised.noise, noised.t))
    found = compute_loss(model, noised)
    (one,) = torch.autograd.grad(found.control[51], shift, retain_graph=True)
    (mean,) = torch.autograd.grad(found.control.mean(), shift)
    assert float(one.norm()) > 1e-3
    assert float(mean.abs().max()) < 1e-9


def z_scores(rows):
    """Of each column's mean, where anything varies."""
    rows = rows.double()
    error = rows.std(dim=0) / len(rows) ** 0.5
    varies = error > 1e-12
    return rows.mean(dim=0)[varies] / error[varies]


def gradients_of_control(model, steps, samples=8):
    """The gradient of the control variate's part of the loss in independent steps."""
    rows = []
    for step in range(steps):
        source = generator("steps", step)
        x0 = torch.randn(samples, 2, generator=source, dtype=WIDE)
        rows.append(gradient(model, model.loss(Clean(x0), source).control.mean()))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({}, {}),
        ({"order": 1}, {"target": STF("batch")}),
        ({}, {"target": STF("batch")}),
        ({"order": 1, "expectation": "rademacher"}, {}),
        ({"order": 1, "expectation": "rademacher", "probes": 2}, {"draws": CARV(2)}),
        ({"order": 1}, {"draws": CARV(2, antithetic=True)}),
        ({"order": 2}, {"draws": CARV(4, antithetic=(0.1, 1.0)), "target": STF("batch")}),
    ],
    ids=str,
)
def test_with_other_estimators_too_the_mean_of_the_gradient_stays(options, slots):
    control = with_coefficients(TaylorCV(bins=4, gate="open", **options))
    model = module(control, width=4, timesteps=LogUniform(0.05, 5.0), **slots)
    found = z_scores(gradients_of_control(model, 60))
    assert len(found) > 40
    assert float(found.abs().max()) < 4.5


def test_the_same_test_finds_the_bias_of_a_coefficient_that_depends_on_the_noise():
    """That of each draw's own sign: the term's absolute value is subtracted."""

    class Biased(TaylorCV):
        def terms(self, network, noised, objective):
            found = super().terms(network, noised, objective)
            return found * found.detach().sign()

    model = module(Biased(1, gate="open"), width=4, timesteps=LogUniform(0.05, 5.0))
    assert float(z_scores(gradients_of_control(model, 60)).abs().max()) > 8


def test_antithetic_pairs_leave_nothing_for_order_0():
    control = with_coefficients(TaylorCV(bins=4, gate="open"))
    paired = module(control, draws=CARV(2, antithetic=True))
    single = module(control)
    nothing, something = gradients_of_control(paired, 3), gradients_of_control(single, 3)
    assert float(nothing.abs().max()) < 1e-10 * float(something.abs().max())


def test_the_loss_still_uses_targets_of_references():
    clean = Clean(torch.randn(10, 2, generator=generator("clean"), dtype=WIDE))
    plain = module(target=STF("batch"))
    controlled = module(TaylorCV(gate="open"), target=STF("batch"))
    expected = plain.loss(clean, generator("loss"))
    found = controlled.loss(clean, generator("loss"))
    torch.testing.assert_close(found.per_draw, expected.per_draw)
    assert torch.equal(found.target.x0, expected.target.x0)
    assert not torch.equal(found.target.x0, found.noised.x0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": 1},
        {"order": 2},
        {"order": 1, "expectation": "rademacher", "probes": 2},
        {"control": "objective"},
    ],
    ids=str,
)
def test_draws_in_chunks_have_the_loss_and_the_gradient_of_all_at_once(options):
    found = []
    for chunk in (3, None):
        control = with_coefficients(TaylorCV(bins=2, gate="open", **options))
        model = module(control, dtype=torch.float32, draws=CARV(4, chunk_size=chunk))
        if control.control == "objective":
            control.fit.coefficients = control.fit.coefficients[..., :1]
        clean = Clean(torch.randn(4, 2, generator=generator("clean")))
        estimate = model.loss(clean, generator("loss"))
        estimate.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((estimate.loss.detach(), estimate.per_draw, estimate.control, gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_loss_of_each_draw_is_without_the_term():
    model = module(TaylorCV(gate="open"))
    noised = draws_of(model)
    found, plain = compute_loss(model, noised), compute_loss(module(), noised)
    torch.testing.assert_close(found.per_draw, plain.per_draw)
    torch.testing.assert_close(found.loss, (found.per_draw + found.control).mean())
    assert float(found.control.detach().abs().min()) > 0


def test_without_gradients_the_control_variate_is_left_out():
    model = module(TaylorCV(2, gate="open"))
    noised = draws_of(model)
    network = Counted(model)
    with torch.no_grad():
        found = compute_loss(model, noised, network)
    assert network.rows == [12]
    assert found.control is None
    assert torch.equal(found.loss, found.per_draw.mean())


def value_statistics(model, noised):
    """What a pilot would find of loss values, and nothing of gradients."""
    control = model.control_variate
    with torch.no_grad():
        losses = compute_loss(module(prediction=model.prediction), noised).per_draw
        terms = taylor_terms(model.predict, noised, model.objective, control.order).sum(dim=1)
        terms = terms + constant_term(noised, model.objective)
    bins = control.bin(noised.t, model.objective)
    sums = torch.zeros(2, control.bins, dtype=WIDE)
    for b in range(control.bins):
        loss, term = losses[bins == b], terms[bins == b]
        sums[:, b] = torch.stack([((loss - loss.mean()) * term).sum(), term.square().sum()])
    ones = torch.ones(control.bins, control.parts, dtype=WIDE)
    squares = torch.diag_embed(ones)
    return PilotStatistics(ones, squares, ones[:, 0], ones[0, 0], ones[:, 0], *sums)


@pytest.mark.parametrize(("order", "least"), [(0, 5), (1, 50)])
def test_the_objectives_coefficient_makes_the_values_of_the_loss_less_noisy(order, least):
    control = TaylorCV(order, bins=2, gate="open", control="objective")
    model = module(control, prediction="epsilon", timesteps=LogUniform(0.001, 0.02))
    control.fit.add(value_statistics(model, draws_of(model, 2000)))
    # of one sample's noise alone: samples differ too
    noised = draws_of(model, 2000, key=2)
    noised = replace(noised, x0=torch.zeros_like(noised.x0) + 0.3)
    noised = replace(noised, xt=noised.x0 + noised.sigma[:, None] * noised.noise)
    found = compute_loss(model, noised)
    plain, values = found.per_draw.detach(), (found.per_draw + found.control).detach()
    assert float(plain.var() / values.var()) > least
    assert abs(float(values.mean() / plain.mean()) - 1) < 0.1


@orders
def test_the_objectives_term_includes_the_part_without_parameters(order):
    control = TaylorCV(order, gate="open", control="objective")
    control.fit.coefficients = torch.full((8, 1), 0.6, dtype=WIDE)
    model = module(control)
    noised = draws_of(model)
    terms = taylor_terms(model.predict, noised, model.objective, order).sum(dim=1)
    expected = -0.6 * (terms + constant_term(noised, model.objective))
    torch.testing.assert_close(compute_loss(model, noised).control, expected)


def test_directions_are_drawn_with_unit_covariance_and_without_regard_to_the_noise(z_score):
    noised = draws_of(module(), 4000)
    control = TaylorCV(1, "rademacher", probes=3)
    before = replace(noised)
    probes = control.draw(noised, generator("probes")).probes
    assert noised == before
    assert probes.shape == (4000, 3, 2)
    assert probes.dtype == WIDE
    assert (probes.abs() == 1).all()
    flat = probes.flatten(1)
    for i, j in itertools.combinations(range(6), 2):
        assert abs(z_score(flat[:, i] * flat[:, j])) < 4.5
    for i, j in itertools.product(range(6), range(2)):
        assert abs(z_score(flat[:, i] * noised.noise[:, j])) < 4.5


def test_without_random_directions_nothing_is_drawn():
    source = generator("unused")
    noised = draws_of(module())
    assert TaylorCV(1).draw(noised, source) is noised
    assert torch.equal(source.get_state(), generator("unused").get_state())


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"order": 1}, 17, "at most 16 numbers .* order 1, got 17: use expectation='rad"),
        ({"order": 2}, 17, "at most 16 numbers .* order 2, got 17: use order 1 or 0"),
        ({"order": 1}, 16, None),
        ({"order": 0}, 17, None),
        ({"order": 1, "expectation": "rademacher"}, 17, None),
    ],
    ids=str,
)
def test_exact_traces_are_for_samples_of_few_numbers(options, size, message):
    x0 = torch.zeros(2, 1, size)
    noised = IID()(Clean(x0), module().objective, generator(0))
    control = TaylorCV(**options)
    if message is None:
        assert control.draw(noised, generator(0)).x0 is noised.x0
    else:
        with pytest.raises(ValueError, match=message):
            control.draw(noised, generator(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "`order` must be 0, 1 or 2, got 3"),
        ({"order": -1}, "`order` must be 0, 1 or 2, got -1"),
        (
            {"order": 1, "expectation": "hutchinson"},
            "`expectation` must be 'exact' or 'rademacher', got 'hutchinson'",
        ),
        (
            {"expectation": "rademacher"},
            "must be 'exact' with order 0, got .* the mean of order 0 is",
        ),
        (
            {"order": 2, "expectation": "rademacher"},
            "must be 'exact' with order 2, got .* takes exact traces",
        ),
        ({"order": 1, "probes": 2}, "`probes` must be 1 with expectation='exact', got 2: leave"),
        (
            {"order": 1, "expectation": "rademacher", "probes": 0},
            "`probes` must be at least 1, got 0",
        ),
        ({"bins": 0}, "`bins` must be at least 1, got 0"),
        ({"refit_every_n_steps": 0}, "`refit_every_n_steps` must be at least 1, got 0"),
        ({"gate": "closed"}, "`gate` must be 'auto', 'open' or two noise .* got 'closed'"),
        ({"gate": "on"}, "`gate` must .* got 'on'"),
        ({"gate": (1.0, 1.0)}, r"0 <= low < high, got \(1.0, 1.0\)"),
        ({"gate": (-1.0, 1.0)}, r"0 <= low < high, got \(-1.0, 1.0\)"),
        ({"gate": (0.0, math.nan)}, "`gate` must be"),
        ({"gate": (0.0, 1.0, 2.0)}, "`gate` must be"),
        ({"control": "loss"}, "`control` must be 'gradient' or 'objective', got 'loss'"),
    ],
    ids=str,
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        TaylorCV(**options)


def learned(**options):
    """A control variate after a pilot of random statistics."""
    control = TaylorCV(**options)
    source = generator("learned")
    c = torch.randn(control.bins, control.parts, 9, generator=source, dtype=WIDE)
    g = c.sum(dim=1) + torch.randn(control.bins, 9, generator=source, dtype=WIDE)
    ones = torch.full((control.bins,), 1 / control.bins, dtype=WIDE)
    control.fit.cost = Cost(0.01, 0.1)
    control.fit.add(
        PilotStatistics(
            torch.einsum("bp,bkp->bk", g, c),
            torch.einsum("bkp,blp->bkl", c, c),
            g.square().sum(dim=1),
            1.5 * g.square().sum(),
            ones,
            ones,
            ones,
        )
    )
    control.pilot = {"count": 1, "next": 17, "spent": 3.5, "steps": 0.75, "seconds": 0.125}
    return control


@pytest.mark.parametrize(
    "options", [{}, {"order": 1, "bins": 3}, {"control": "objective"}], ids=str
)
def test_what_is_learned_is_in_a_file_of_weights(options, tmp_path):
    control = learned(**options)
    assert control.fit.is_open.any()
    torch.save(module(control).state_dict(), tmp_path / "weights.pt")
    again = TaylorCV(**options)
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    found = module(again).load_state_dict(state)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert again.get_extra_state() == control.get_extra_state()
    assert torch.equal(again.fit.coefficients, control.fit.coefficients)
    assert torch.equal(again.fit.is_open, control.fit.is_open)
    noised = draws_of(module())
    one, other = compute_loss(module(again), noised), compute_loss(module(control), noised)
    assert torch.equal(one.loss, other.loss)


@pytest.mark.parametrize(
    ("options", "differing"),
    [
        ({"order": 2}, "`order` is 2, the checkpoint's is 1"),
        (
            {"order": 1, "expectation": "rademacher"},
            "`expectation` is 'rademacher', the checkpoint's is 'exact'",
        ),
        ({"order": 1, "bins": 4}, "`bins` is 4, the checkpoint's is 8"),
        (
            {"order": 1, "control": "objective"},
            "`control` is 'objective', the checkpoint's is 'gradient'",
        ),
        ({"bins": 4}, "`order` is 0, the checkpoint's is 1, `bins` is 4, the checkpoint's is 8"),
    ],
    ids=str,
)
def test_what_was_learned_with_other_settings_is_dropped_with_a_warning(options, differing, caplog):
    control = TaylorCV(**options)
    found = module(control).load_state_dict(module(learned(order=1)).state_dict())
    assert [record.getMessage() for record in caplog.records] == [
        f"TaylorCV: {differing}: its coefficients and gate are dropped, and learning starts anew."
    ]
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert control.get_extra_state() == TaylorCV(**options).get_extra_state()


def test_a_checkpoint_without_a_control_variate_leaves_it_as_built(caplog):
    control = learned()
    found = module(control).load_state_dict(module().state_dict())
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert control.get_extra_state() == learned().get_extra_state()
    assert [record.getMessage() for record in caplog.records] == [
        "TaylorCV: the checkpoint was written with a different estimator or proposal in this slot: "
        "TaylorCV starts as it was built."
    ]


def test_a_checkpoint_with_a_control_variate_loads_without_one_with_a_warning(caplog):
    trained = module(learned())
    model = module()
    torch.nn.init.zeros_(model.network.project_out.weight)
    model.load_state_dict(trained.state_dict())
    assert torch.equal(model.network.project_out.weight, trained.network.project_out.weight)
    assert [record.getMessage() for record in caplog.records] == [
        "`control_variate` is None, but the checkpoint was written with one: what that one learned "
        "is dropped."
    ]
