"""Every estimator under every pair of features of the trainer, against plain autograd.

Runs are a covering array of strength 3 over the estimator, the precision, the clipping and
switches: every combination of three of them is in some run, with others around it.

The oracle is a loop by hand, in float32: it draws by the documented keys, differentiates all
micro-batches of a step at once, and clips, steps and averages by hand; no trainer, chunk, compiler
or checkpoint is in it. A run with the features must change the weights as the oracle does. Errors
are norms, relative to the change of all weights, and of each tensor (where that is small, of 1 % of
all):

| features | all weights | each tensor | why |
|---|---|---|---|
| none that rounds | 1e-5 | 1e-4 | float32 sums in another order |
| 16-mixed | 5e-3 | 2e-2 | 11 bits: products are off by 5e-4 |
| bf16-mixed | 3e-2 | 1.5e-1 | 8 bits: products are off by 4e-3 |
| bf16-true | 1e-1 | 2e-1 | the same, besides the rounding of each weight in each step, 2^-9 of it |

What was learned (tables, coefficients) is compared as tensors are. Half a micro-batch, a chunk
or a factor of the loss scale are errors of 0.3 and more.
"""

import copy
import functools
import itertools
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import diffusers
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from support.compilers import Compiled
from support.covering_arrays import covering_array
from support.networks import small_mlp, small_unet
from support.points import Points, normal_points
from support.selections import mostly_slow
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_vr import (
    CARV,
    EMA,
    STF,
    Clean,
    DiffusersSchedule,
    DiffusionModule,
    LearnedProposal,
    Noised,
    ResidualMLP,
    TargetEstimate,
    TaylorCV,
)
from lightning_vr.core.rng import generator
from lightning_vr.core.rows import concatenated, tensors
from lightning_vr.core.types import LossEstimate, StepPart
from lightning_vr.estimators.loss import diffusion_loss
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.process.sampling import Sampler, Samples
from lightning_vr.process.weightings import UnitWeighting
from lightning_vr.training import resamples_pilot as resamples_pilots
from lightning_vr.training.control_pilot import control_pilot

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    # torch 2.13 loads its forward-mode derivatives with it, nothing of ours
    pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated"),
]

STEPS, SAMPLES, BATCH = 2, 16, 8
SEED, RATE, DECAY, LOSS_SCALE = 5, 0.05, 0.5, 1024.0
CLIPPING = {"clip-norm": ("norm", 2.0), "clip-value": ("value", 0.5)}
PRECISIONS = ["16-mixed", "bf16-mixed", "bf16-true"]
SWITCHES = ["compile", "checkpointing", "accumulation", "ema"]
FEATURES = [*PRECISIONS, *CLIPPING, *SWITCHES]
TOLERANCES = {
    "16-mixed": (5e-3, 2e-2),
    "bf16-mixed": (3e-2, 1.5e-1),
    "bf16-true": (1e-1, 2e-1),
    None: (1e-5, 1e-4),
}
ROUNDING = 2.0**-9
"""Of a bfloat16, relative to it."""

ESTIMATORS = {
    "plain": dict,
    "stf-batch": lambda: {"target": STF("batch")},
    "stf-bank": lambda: {"target": STF(6)},
    "stf-all": lambda: {"target": STF("all")},
    "carv-pairs": lambda: {"draws": CARV(2, scope="nested", antithetic=True)},
    "carv-learned": lambda: {"draws": CARV(3, LearnedProposal(bins=2), chunk_size=5)},
    "carv-auto": lambda: {"draws": CARV("auto", max_resamples=3)},
    "taylor-0": lambda: {"control_variate": TaylorCV(0, **FITTED)},
    "stf-carv": lambda: {"target": STF(6), "draws": CARV(2, chunk_size=3)},
    "taylor-1": lambda: {"control_variate": TaylorCV(1, **FITTED)},
}
FITTED = {"bins": 2, "gate": "open", "refit_every_n_steps": STEPS}


FACTORS = {
    "estimator": [*ESTIMATORS],
    "precision": [None, *PRECISIONS],
    "clipping": [None, *CLIPPING],
    **{switch: [None, switch] for switch in SWITCHES},
}


def is_refused(name, features):
    """Return whether forward mode would differentiate through a checkpoint."""
    return name == "taylor-1" and "checkpointing" in features


def is_allowed(row):
    return not is_refused(row["estimator"], row.values())


ROWS = covering_array(FACTORS, 3, is_allowed)
CASES = [(name, ()) for name in ESTIMATORS]
for row in ROWS:
    case = row["estimator"], tuple(each for each in FEATURES if each in row.values())
    CASES += [case] if case not in CASES else []
REFUSED_CASES = [
    ("taylor-1", tuple(each for each in FEATURES if each in {"checkpointing", feature}))
    for feature in FEATURES
]


def name_of(case):
    return case if isinstance(case, str) else "with-" + ("-and-".join(case) or "nothing")


POINTS = Points(normal_points(SAMPLES, "points").bfloat16().float())
"""Points that bfloat16 holds: what it rounds is what training makes of them."""


class Checkpointed(nn.Module):
    """A network that keeps no activations, and counts its passes."""

    def __init__(self, network):
        super().__init__()
        self.network, self.passes = network, 0

    def forward(self, x, t):
        return checkpoint(self._pass, x, t, use_reentrant=False)

    def _pass(self, x, t):
        self.passes += 1
        return self.network(x, t)


@pytest.fixture(autouse=True)
def nothing_falls_back_to_eager():
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(autouse=True)
def an_expensive_encode(monkeypatch):
    """Let pilots run all that they time, and find what does not depend on the machine."""
    seconds = itertools.cycle([20.0, 21.0])
    monkeypatch.setattr(
        resamples_pilots, "timed", lambda function, device: (function(), next(seconds))
    )


@functools.cache
def start():
    return [p.detach().bfloat16().float() for p in small_mlp(16, std=0.3).parameters()]


@functools.cache
def shared_network(checkpointed, compiled):
    """One network for all cases: it is compiled once for each precision and kind of pass."""
    network = ResidualMLP(2, width=16, depth=1)
    if compiled:
        network = torch.compile(network, backend=Compiled.backend, dynamic=True)
    return Checkpointed(network) if checkpointed else network


def module_of(name, features=()):
    network = shared_network("checkpointing" in features, "compile" in features)
    network.to("cpu", torch.float32)
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), start(), strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return seeded_module(network, **ESTIMATORS[name]())


def seeded_module(network, **options):
    module = DiffusionModule(network, optimizer=lambda p: torch.optim.SGD(p, lr=RATE), **options)
    module.seed = SEED
    return module


def weights(module):
    return [p.detach().cpu().float().clone() for p in module.parameters()]


class Run(NamedTuple):
    """Weights after each step, what is left at the end, and what was learned beside them."""

    steps: list
    last: list
    learned: list


def learned(module):
    """What an estimator has learned: the number of draws, and numbers that precision rounds."""
    control, proposal = module.control_variate, getattr(module.draws, "proposal", None)
    numbers = [] if control is None else [control.fit.coefficients]
    if proposal is not None:
        numbers.append(proposal.table.cpu().clone())
    return [module.draws.draws_per_sample, numbers]


@functools.cache
def by_hand(name, parts, clipping, device):
    """The loop of the oracle."""
    module = module_of(name)
    module.network = copy.deepcopy(module.network)
    module.to(device)
    module._trainer = SimpleNamespace(
        estimated_stepping_batches=STEPS,
        sanity_checking=False,
        accumulate_grad_batches=parts,
        precision_plugin=Precision(),
    )
    x0, index = POINTS.x0.to(device), torch.arange(SAMPLES, device=device)
    if module.target.bank_size != 0:
        module.target.fill(x0, None, indexed=True)
    unseen = dict.fromkeys(("log", "open_curve_log", "log_rows", "log_table"), lambda *given: None)
    run = replace(RunContext.of(module.trainer), **unseen)
    pilots = [
        pilot for pilot in (module.make_resamples_pilot(run), control_pilot(module, run)) if pilot
    ]
    size, parameters, found = BATCH // parts, list(module.parameters()), []
    for step in range(STEPS):
        module._trainer.global_step = step
        rows = []
        for part in range(parts):
            at = slice(step * BATCH + part * size, step * BATCH + (part + 1) * size)
            batch = {"x0": x0[at], "index": index[at]}
            if part == 0:
                for pilot in pilots:
                    pilot.before_step(batch)
            rows.append(drawn(module, batch, step, part, parts, device))
        whole = concatenated(rows)
        noised, target = Noised(**whole["noised"]), TargetEstimate(**whole["target"])
        estimate = diffusion_loss(
            module.predict, noised, target, module.objective, module.control_variate
        )
        gradients = clipped(torch.autograd.grad(estimate.loss, parameters), clipping)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= RATE * gradient
            seen = LossEstimate(estimate.loss, estimate.per_draw, noised, target)
            module.draws.observe(seen, module.objective)
        module.draws.advance()
        found.append(weights(module))
    return Run(found, found[-1], learned(module))


def drawn(module, batch, step, part, parts, device):
    clean = Clean(batch["x0"], index=batch["index"])
    source = generator(SEED, 0, "train", step, part, device=device)
    share = StepPart(part, parts, generator(SEED, "strata", step, device=device))
    times = module.draws.times(clean, module.objective, source, share)
    noised, target = module.draw(clean, source, times)
    return {"noised": tensors(noised), "target": tensors(target)}


def clipped(gradients, kind):
    if kind is None:
        return gradients
    _, limit = CLIPPING[kind]
    if kind == "clip-value":
        return [gradient.clamp(-limit, limit) for gradient in gradients]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return [gradient * min(1.0, limit / float(norm)) for gradient in gradients]


def oracle(name, features, device="cpu"):
    clipping = next((feature for feature in features if feature in CLIPPING), None)
    run = by_hand(name, 2 if "accumulation" in features else 1, clipping, device)
    if "ema" not in features:
        return run
    average = run.steps[0]
    for step in run.steps[1:]:
        average = [DECAY * a + (1 - DECAY) * b for a, b in zip(average, step, strict=True)]
    return run._replace(last=average)


class Watch(Callback):
    """Keeps the weights after each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > len(self.steps):
            self.steps.append(weights(module))


def scaled_precision(scale=LOSS_SCALE, device="cpu", **options):
    """float16 with a loss scale: Lightning's own "16-mixed" on a CPU is bfloat16."""
    scaler = torch.amp.GradScaler(device, init_scale=scale, **options)
    return [MixedPrecision("16-mixed", device, scaler)]


def settings(features, device="cpu"):
    options = {"accumulate_grad_batches": 2 if "accumulation" in features else 1}
    for feature in features:
        if feature == "16-mixed":
            options["plugins"] = scaled_precision(device=device)
        elif feature in PRECISIONS:
            options["precision"] = feature
        elif feature in CLIPPING:
            algorithm, limit = CLIPPING[feature]
            options |= {"gradient_clip_algorithm": algorithm, "gradient_clip_val": limit}
        elif feature == "ema":
            options["callbacks"] = [EMA(decay=DECAY)]
    return options


def trained(module, device="cpu", data=POINTS, steps=STEPS, **options):
    watch, parts = Watch(), options.get("accumulate_grad_batches", 1)
    accelerator = "cpu" if device == "cpu" else "gpu"
    callbacks = [watch, *options.pop("callbacks", [])]
    settings = {"accelerator": accelerator, "devices": 1, "max_steps": steps} | options
    quiet_trainer(*callbacks, **settings).fit(module, DataLoader(data, batch_size=BATCH // parts))
    return Run(watch.steps, weights(module), learned(getattr(module, "_orig_mod", module)))


def errors(found, expected, rounded=0.0):
    """Errors of the change of all weights and, at most, of a tensor, less so many roundings."""
    changes = [b - a for a, b in zip(start(), expected, strict=True)]
    wrong = [a - b for a, b in zip(found, expected, strict=True)]
    whole = norm(changes)
    each = [
        max(0.0, float(x.norm()) - rounded * ROUNDING * float(w.norm()))
        / float(change.norm() + 0.01 * whole)
        for x, change, w in zip(wrong, changes, start(), strict=True)
    ]
    excess = float(norm(wrong)) - rounded * ROUNDING * float(norm(start()))
    return max(0.0, excess) / float(whole), max(each)


def norm(parts):
    return torch.cat([part.flatten() for part in parts]).norm()


def check_case(name, features, device="cpu"):
    module = module_of(name, features)
    calls, passes = Compiled.calls, getattr(module.network, "passes", 0)
    found = trained(module, device, **settings(features, device))
    expected = oracle(name, features, device)

    precision = next((feature for feature in features if feature in PRECISIONS), None)
    all_weights, each_tensor = TOLERANCES[precision]
    pairs = [(found.steps[0], expected.steps[0]), (found.last, expected.last)]
    for number, (a, b) in enumerate(pairs, start=1):
        whole, worst = errors(a, b, number if precision == "bf16-true" else 0)
        assert whole < all_weights
        assert worst < each_tensor
        if precision is not None:
            assert errors(a, b)[0] > 1e-4  # it did round
    assert found.learned[0] == expected.learned[0]
    # averaging takes a learned table for weights
    numbers = [] if "ema" in features else zip(found.learned[1], expected.learned[1], strict=True)
    for a, b in numbers:
        torch.testing.assert_close(a, b, rtol=each_tensor, atol=each_tensor)
    if "compile" in features:
        assert Compiled.calls >= calls + STEPS
    if "checkpointing" in features:
        assert module.network.passes >= passes + 2 * STEPS


def check_refusal(name, features, device="cpu"):
    module = module_of(name, features)
    with pytest.raises(ValueError, match=r"order 1 needs forward-mode .* checkpointing"):
        trained(module, device, **settings(features, device))
    assert all(torch.equal(a, b) for a, b in zip(weights(module), start(), strict=True))
    if "compile" in features:
        torch._dynamo.reset()  # it gives up on what has failed once


@pytest.mark.parametrize(("name", "features"), CASES, ids=name_of)
def test_training_makes_the_steps_of_plain_autograd(name, features):
    check_case(name, features)


@pytest.mark.parametrize(("name", "features"), REFUSED_CASES, ids=name_of)
def test_forward_mode_through_a_checkpoint_is_refused_before_the_first_step(name, features):
    check_refusal(name, features)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("name", "features"), [*CASES, *REFUSED_CASES], ids=name_of)
def test_on_an_accelerator_too_training_makes_the_steps_of_plain_autograd(name, features):
    check = check_refusal if is_refused(name, features) else check_case
    check(name, features, "cuda")


def test_every_allowed_combination_of_three_is_in_some_run():
    runs = [(name, *features) for name, features in CASES]
    missing = [
        values
        for factors in itertools.combinations(FACTORS, 3)
        for values in itertools.product(*(FACTORS[factor] for factor in factors))
        if is_allowed({"estimator": None, **dict(zip(factors, values, strict=True))})
        and not any(
            all(is_in(run, *pair) for pair in zip(factors, values, strict=True)) for run in runs
        )
    ]
    assert not missing


def is_in(run, factor, value):
    """Return whether a run has a value; that of a factor which is left alone is None."""
    return value in run if value is not None else not set(run) & set(FACTORS[factor])


def test_pilots_and_fits_of_the_cases_decide_something():
    assert oracle("carv-auto", ()).learned[0] == 3
    coefficients, _ = oracle("taylor-1", ()).learned[1][0].unbind(-1)
    assert not torch.equal(coefficients, torch.ones_like(coefficients))


PICTURES = Points(torch.randn(SAMPLES, 1, 8, 8, generator=generator("pictures")))


CHECKPOINTED = ["plain", "stf-bank", "carv-learned", "carv-auto", "taylor-0", "taylor-1"]
"""What pilots, chunks and pairs of passes do; ``-m slow`` runs the rest too."""


@pytest.mark.parametrize("name", mostly_slow([*ESTIMATORS], CHECKPOINTED))
def test_a_unet_that_checkpoints_its_blocks_trains_as_one_that_does_not(name):
    found = []
    refused = name == "taylor-1"
    for checkpointed in (True,) if refused else (False, True):
        network = small_unet(block_out_channels=(4,), norm_num_groups=2, add_attention=False)
        if checkpointed:
            network.enable_gradient_checkpointing()
        options = ESTIMATORS[name]()
        if refused:
            options["control_variate"] = TaylorCV(1, expectation="rademacher", **FITTED)
        module = seeded_module(network, **options)
        if refused:
            with pytest.raises(ValueError, match=r"needs forward-mode .* checkpointing"):
                trained(module, data=PICTURES, steps=1)
            return
        before = weights(module)
        after = trained(module, data=PICTURES, steps=1).last
        found.append([b - a for a, b in zip(before, after, strict=True)])
    plain, checkpointed = found
    difference = norm([b - a for a, b in zip(plain, checkpointed, strict=True)])
    assert 0 <= float(difference) < 1e-5 * float(norm(plain))
    assert float(norm(plain)) > 1e-2


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_torchs_own_compiler_makes_the_same_steps():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.out = nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x, t):
            return self.out(torch.tanh(self.linear(x)))

    found = []
    for compiled in (False, True):
        network = torch.compile(Small()) if compiled else Small()
        found.append(trained(seeded_module(network, draws=CARV(2, chunk_size=8))).last)
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


class Faint(UnitWeighting):
    """A loss whose gradients float16 can hold only if it is scaled."""

    def forward(self, schedule, t):
        return 2.0**-30 * super().forward(schedule, t)


@pytest.mark.parametrize("name", ["carv-learned", "carv-auto", "taylor-0", "stf-carv"])
def test_faint_gradients_are_scaled_in_chunks_and_pilots_too(name):
    options = {"weighting": Faint("edm"), **ESTIMATORS[name]()}
    module = module_of(name)
    module = seeded_module(module.network, **options)
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=RATE * 2.0**30)
    found = trained(module, plugins=scaled_precision(LOSS_SCALE * 2.0**30))
    expected = oracle(name, ())
    whole, worst = errors(found.last, expected.last)
    assert whole < TOLERANCES["16-mixed"][0]
    assert worst < TOLERANCES["16-mixed"][1]
    assert found.learned[0] == expected.learned[0]
    if name == "taylor-0":
        torch.testing.assert_close(found.learned[1], expected.learned[1], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["carv-learned", "carv-auto", "taylor-0"])
def test_a_checkpoint_of_averaged_weights_holds_what_was_learned_as_it_is(name, tmp_path):
    """Averaging would fade tables in, and leave coefficients and numbers of draws at the start."""

    class Save(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == STEPS:
                trainer.save_checkpoint(tmp_path / "averaged.ckpt")
                seen.append(learned(module))

    seen = []
    trained(module_of(name), callbacks=[EMA(decay=DECAY), Save()])
    checkpoint = torch.load(tmp_path / "averaged.ckpt", weights_only=True)
    module = module_of(name)
    module.load_state_dict(checkpoint["state_dict"])
    (resamples, numbers), (expected, others) = learned(module), seen[0]
    assert resamples == expected
    assert all(torch.equal(a, b) for a, b in zip(numbers, others, strict=True))
    assert errors(weights(module), oracle(name, ("ema",)).last)[0] < 1e-5


def too_large():
    return scaled_precision(2.0**40, backoff_factor=LOSS_SCALE / 2.0**40)


class TestOverflow:
    """float16 begins with a loss scale that is too large, and halves it step by step."""

    @pytest.mark.parametrize("name", ["plain", "carv-learned", "carv-auto", "taylor-1"])
    def test_a_step_whose_gradient_overflows_is_not_made_and_the_next_one_is(self, name):
        module = module_of(name)
        run = trained(module, plugins=too_large())
        first, second = run.steps
        assert all(torch.equal(a, b) for a, b in zip(first, start(), strict=True))
        assert all(bool(x.isfinite().all()) for x in second)
        assert 0.01 < float(norm([b - a for a, b in zip(first, second, strict=True)])) < 10

    def test_a_pilot_whose_gradients_overflow_comes_again(self, caplog):
        module = module_of("carv-auto")
        with caplog.at_level(logging.INFO):
            trained(module, plugins=too_large())
        assert "CARV at step 0: gradients are not finite" in caplog.text
        assert module.draws.pilot["step"] == 1
        assert module.draws.chosen == 3

    def test_pilots_that_overflow_again_and_again_come_less_and_less_often(self, caplog):
        module = module_of("carv-auto")
        scale = scaled_precision(2.0**100, backoff_factor=0.99)
        with caplog.at_level(logging.INFO):
            trained(module, steps=8, max_epochs=-1, plugins=scale)
        steps = [i for i in range(8) if f"CARV at step {i}: gradients are not" in caplog.text]
        assert steps == [0, 1, 3, 7]
        assert module.draws.chosen == 1


class TestBfloat16:
    """Under "bf16-true" torch's default is bfloat16 and every float of a module is cast to it."""

    def test_what_is_drawn_is_what_float32_draws(self):
        found = []
        for context in (Precision().forward_context, HalfPrecision("bf16-true").forward_context):
            module = DiffusionModule(
                ResidualMLP(2, width=8, num_class_embeds=3),
                num_classes=2,
                label_dropout=0.3,
                draws=CARV(2, LearnedProposal()),
            )
            with context():
                clean = Clean(torch.zeros(600, 2, dtype=torch.float32), torch.arange(600) % 2)
                loss = module.loss(clean, generator(SEED))
                noise = module.sample(2, shape=(2,), source=generator(SEED), sampler=Nothing())
            found.append((loss.noised, noise))
        (plain, first), (half, second) = found
        assert torch.equal(plain.t, half.t)
        assert torch.equal(plain.xt, half.xt)
        assert torch.equal(plain.group, half.group)
        assert torch.equal(first, second)
        assert second.dtype == torch.float32

    def test_tables_keep_their_precision(self):
        module = DiffusionModule(
            ResidualMLP(2, width=8),
            schedule=DiffusersSchedule(diffusers.DDPMScheduler()),
            prediction="epsilon",
            draws=CARV(2, LearnedProposal(bins=2)),
        )
        levels = module.schedule.log_noise_level.clone()
        trained(module, precision="bf16-true")
        assert module.network.project_in.weight.dtype == torch.bfloat16
        assert torch.equal(module.schedule.log_noise_level, levels)
        assert module.draws.proposal.table.dtype == torch.float64
        assert float(module.draws.proposal.table[2].sum()) == 2 * SAMPLES

    def test_an_mlp_tells_times_apart_as_it_does_in_float32(self):
        network, t = ResidualMLP(2, width=16), torch.linspace(900, 901, 5)
        seen = []
        network.embed_time.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for dtype in (torch.float32, torch.bfloat16):
            network.to(dtype)(torch.zeros(5, 2, dtype=dtype), t)
        torch.testing.assert_close(seen[1].float(), seen[0], rtol=0, atol=2**-8)
        assert seen[1].dtype == torch.bfloat16


class Nothing(Sampler):
    """A sampler that returns the noise that it is given."""

    def draw(self, denoise, schedule, noise, **_):
        return Samples(noise, 0)


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.middle, self.last = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, t):
        hidden = checkpoint(self.middle, self.first(x), use_reentrant=True)
        return self.last(torch.tanh(hidden))


class TestRefused:
    @pytest.mark.parametrize(
        "options",
        [
            {"draws": CARV(2, chunk_size=3)},
            {"draws": CARV("auto")},
            {"control_variate": TaylorCV(refit_every_n_steps=1)},
            # its first pilot would come after an hour
            {"control_variate": TaylorCV()},
        ],
        ids=["chunks", "auto", "taylor", "taylor-later"],
    )
    def test_reentrant_checkpoints_where_gradients_are_taken_by_pilots_or_chunks(self, options):
        module = seeded_module(Reentrant(), **options)
        before = weights(module)
        with pytest.raises(ValueError, match=r"`use_reentrant` .* must be False .* got True"):
            trained(module)
        assert all(torch.equal(a, b) for a, b in zip(weights(module), before, strict=True))

    @pytest.mark.parametrize("options", [{}, {"draws": CARV(2)}, {"target": STF(6)}], ids=str)
    def test_reentrant_checkpoints_are_not_refused_elsewhere(self, options):
        module = seeded_module(Reentrant(), **options)
        before = weights(module)
        assert float(norm([b - a for a, b in zip(before, trained(module).last, strict=True)])) > 0

    def test_a_module_that_is_compiled_as_a_whole(self):
        in_place = module_of("plain")
        in_place.compile(backend="eager")
        for module in (torch.compile(module_of("plain"), backend="eager"), in_place):
            with pytest.raises(ValueError, match=r"compile the network, as in DiffusionModule\("):
                trained(module)

    @pytest.mark.parametrize(
        "strategy",
        [
            FSDPStrategy,
            ModelParallelStrategy,
            # of DeepSpeed, which need not be installed
            lambda: SimpleNamespace(zero_stage_3=True),
        ],
        ids=["fsdp", "model-parallel", "deepspeed-3"],
    )
    def test_strategies_that_shard_the_weights(self, strategy):
        module = module_of("plain")
        module._trainer = SimpleNamespace(strategy=strategy())
        with pytest.raises(ValueError, match="`strategy` must leave all weights on each rank"):
            module.setup("fit")

    def test_a_compiled_network_without_room_for_dropped_labels(self):
        network = torch.compile(ResidualMLP(2, width=8, num_class_embeds=2), backend="eager")
        with pytest.raises(ValueError, match="2 classes and the dropped label, got a ResidualMLP"):
            DiffusionModule(network, num_classes=2)
