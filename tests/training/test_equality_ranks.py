"""A short run on two or three processes against one process with the whole batch and their draws.

The one process, ``alone``, is no trainer: it is handed the samples of all ranks in their order and
what each rank drew for them, and computes targets, losses, gradients and steps by itself.
"""

import functools
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from support.points import Points, normal_points, two_classes
from support.ranks import launch
from support.selections import mostly_slow
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import (
    CARV,
    STF,
    Clean,
    DiffusionModule,
    FrechetDistance,
    GradientVariance,
    LearnedProposal,
    ResidualMLP,
    Sampler,
    TargetVariance,
    TaylorCV,
)
from lightning_vr.callbacks import gradient_variance_report as gradient_report
from lightning_vr.callbacks import target_variance_report as target_report
from lightning_vr.core.gradients import parameter_groups
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Noised, TargetEstimate
from lightning_vr.metrics import FrechetMetric, IdentityFeatures
from lightning_vr.process.timesteps import LogUniform
from lightning_vr.training.noisy_losses import DiffusionLoss
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_measurement import GradientMeasurement
from lightning_vr.variance.gradient_statistics import GradientStatistics
from lightning_vr.variance.removed_variance import RemovedVariance
from lightning_vr.variance.target_curves import TargetVarianceCurve

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

# Every number is a sum of the same float32 terms in another order: over ranks first, or in matrix
# products of other sizes. A sum of a few dozen terms is off by some 1e-6 of its largest term.
ROUNDING = {"rtol": 2e-5, "atol": 2e-6}
# Variances are summed in float64, but from float32 gradients and spreads, which may be small
# differences of large numbers.
VARIANCE_ROUNDING = 1e-4

LIMIT = timedelta(seconds=60)
"""After so long ranks are taken to hang."""

POINTS, SEED, RATE = 25, 5, 0.02
WINDOW, STEPS = 2, 2
SAMPLES = {1: 6, 2: 3, 3: 2}
"""Samples in a batch of each rank, so that a step has 12 in all."""
DRAWN = 9
"""References that are drawn from a bank."""
GENERATED = 300
"""Two blocks of samples: the last of three ranks has none to draw."""


DATA = Points(normal_points(POINTS, "points of equality"), two_classes(POINTS))


class Network(nn.Module):
    """An MLP that is told of a class and of an angle."""

    def __init__(self, classes):
        super().__init__()
        self.inner = ResidualMLP(2, width=8, depth=1, num_class_embeds=classes and classes + 1)
        nn.init.normal_(self.inner.project_out.weight)

    def forward(self, x, t, class_labels=None, angle=None):
        found = self.inner(x, t, class_labels)
        return found if angle is None else found + torch.stack([angle.cos(), angle.sin()], 1)


class Angles(DiffusionModule):
    """The network is told of an angle, which every third sample shares."""

    def encode(self, batch):
        clean = Clean.from_batch(batch)
        number = clean.index % 3
        return Clean(clean.x0, clean.group, {"angle": 0.7 * number}, clean.index, number)


def labelled(target):
    return {"num_classes": 2, "label_dropout": 0.3, "target": target}


ESTIMATORS = {
    "plain": dict,
    "batch": lambda: {"target": STF("batch")},
    "n": lambda: {"target": STF(DRAWN)},
    "all": lambda: {"target": STF("all")},
    "n-sharded": lambda: {"target": STF(DRAWN, sharded=True)},
    "all-sharded": lambda: {"target": STF("all", sharded=True)},
    "strata": lambda: {"draws": CARV(1)},
    "learned": lambda: {"draws": CARV(2, LearnedProposal(bins=3, memory=0.5))},
    "control": lambda: {"control_variate": TaylorCV(gate="open", bins=2, refit_every_n_steps=1)},
    "classes": lambda: labelled(STF("all")),
    "angles": lambda: labelled(STF("batch")),
    "angles-sharded": lambda: labelled(STF("all", sharded=True)),
}
ON_THREE = ["n-sharded", "all-sharded", "strata", "learned", "angles-sharded"]
"""What is shared out among ranks, in shares that are not halves; ``-m slow`` runs the rest too."""

QUICK = [(name, 3 if name in ON_THREE else 2) for name in ESTIMATORS]


def on_ranks(*names):
    """Run a test of some estimators on two and on three ranks, mostly on one of them."""
    cases = [(name, ranks) for ranks in (2, 3) for name in names]
    quick = [case for case in QUICK if case[0] in names]
    return pytest.mark.parametrize(("name", "ranks"), mostly_slow(cases, quick))


every = on_ranks(*ESTIMATORS)


def build(name):
    slots = ESTIMATORS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(slots.get("num_classes"))
    return (Angles if name.startswith("angles") else DiffusionModule)(
        network,
        timesteps=LogUniform(0.05, 5.0),
        sampler=Sampler(steps=2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=RATE),
        **slots,
    )


def gradient(module):
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def weights(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def table(module):
    proposal = getattr(module.draws, "proposal", None)
    return None if proposal is None else proposal.table.clone()


class Save(Callback):
    """Writes what each rank drew, computed and logged to a file of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.batches, self.steps = [], []

    def on_train_start(self, trainer, module):
        module.target.register_forward_pre_hook(self.keep_source)

    def keep_source(self, target, arguments):
        self.source = arguments[2].get_state()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        control = module.control_variate
        coefficients = None if control is None else control.fit.coefficients
        self.steps.append({"gradient": gradient(module), "coefficients": coefficients})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        estimate = module.estimate
        self.batches.append(
            {
                "index": batch["index"],
                "noised": vars(estimate.noised),
                "target": vars(estimate.target),
                "per_draw": estimate.per_draw,
                "control": estimate.control,
                "loss": estimate.loss,
                "source": self.source,
            }
        )
        if batch_idx % WINDOW == WINDOW - 1:
            self.steps[-1] |= {"weights": weights(module), "table": table(module)}

    def on_train_end(self, trainer, module):
        found = {
            "batches": self.batches,
            "steps": self.steps,
            "numbers": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "curve": trainer.callbacks[0].curve.state(),
            "seed": module.seed,
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def fit(name, ranks, folder, **options):
    """Train; several ranks are processes that a launcher has started."""
    torch.manual_seed(SEED)
    trainer = quiet_trainer(
        TargetVariance([4], noise_levels=3, samples=64),
        GradientVariance(every_n_steps=1, samples=2, noise_levels=2),
        FrechetDistance(samples=GENERATED),
        Save(folder),
        strategy=DDPStrategy(start_method="popen", timeout=LIMIT) if ranks > 1 else "auto",
        devices=ranks,
        accumulate_grad_batches=WINDOW,
        max_epochs=1,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(
        build(name),
        DataLoader(DATA, SAMPLES[ranks], drop_last=True),
        DataLoader(DATA, SAMPLES[ranks]),
    )


def read(folder, ranks):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def joined(parts):
    """Rows of several ranks in their order: tensors, dictionaries of them, or None."""
    first = parts[0]
    if isinstance(first, dict):
        return {name: joined([part[name] for part in parts]) for name in first}
    return None if first is None else torch.cat(parts)


def generator_at(state):
    source = torch.Generator()
    source.set_state(state)
    return source


class Alone:
    """One process that is handed the samples of all ranks and what these have drawn."""

    def __init__(self, name, ranks):
        self.ranks = ranks
        self.module = build(name)
        self.module.seed, self.module.sample_shape = SEED, (2,)
        self.batches, self.steps, self.components = [], [], []
        whole = self.clean(torch.arange(POINTS))
        if self.module.target.bank_size is None:
            given = {"indexed": True, "cond_group": whole.cond_group}
            self.module.target.fill(whole.x0, whole.group, **given)
        for step in range(STEPS):
            self.step(step)

    def clean(self, index):
        return self.module.clean({"x0": DATA.x0[index], "label": index % 2, "index": index})

    def step(self, step):
        module = self.module
        self.components.append(self.measured(step))
        if module.control_variate is not None:
            fitted = self.ranks[0]["steps"][step]["coefficients"]
            module.control_variate.fit.coefficients = fitted
        for number in range(step * WINDOW, (step + 1) * WINDOW):
            self.batch([rank["batches"][number] for rank in self.ranks])

        found = {"gradient": gradient(module)}
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= RATE * parameter.grad
        module.zero_grad()
        module.draws.advance()
        self.steps.append(found | {"weights": weights(module), "table": table(module)})

    def batch(self, parts):
        module = self.module
        clean = self.clean(joined([part["index"] for part in parts]))
        noised = Noised(**joined([part["noised"] for part in parts]))
        repeated = clean.repeated(len(noised.t) // len(clean.x0))
        again = module.schedule.perturb(repeated.x0, noised.noise, noised.t)
        target = self.target(parts, clean, noised)
        estimate = module.compute_loss(noised, target)
        (estimate.loss / WINDOW).backward()
        module.draws.observe(estimate, module.objective)
        self.batches.append(
            {"noised": noised, "x0": repeated.x0, "xt": again, "weight": self.importance(noised)}
            | {"target": vars(target), "control": estimate.control}
            | {"per_draw": estimate.per_draw.detach(), "loss": estimate.loss.detach()}
        )

    def target(self, parts, clean, noised):
        target = self.module.target
        if not isinstance(target, STF) or target.references != DRAWN or target.sharded:
            # ranks that share references out all take what the first one draws
            return target(noised, clean, generator_at(parts[0]["source"]))
        found = []
        for part in parts:
            own, source = self.clean(part["index"]), generator_at(part["source"])
            found.append(vars(target(Noised(**part["noised"]), own, source)))
        return TargetEstimate(**joined(found))

    def importance(self, noised):
        """Weights p/q by the table that this process has learned."""
        proposal, objective = getattr(self.module.draws, "proposal", None), self.module.objective
        if proposal is None:
            return torch.ones_like(noised.t)
        density = proposal(objective, torch.device("cpu"))
        return (1 / density(objective.timesteps.cdf(noised.t.double()))).float()

    @property
    def is_per_sample(self):
        return not (self.module.draws.couples_rows or self.module.target.couples_rows)

    def measured(self, step):
        """The mean over ranks of what each measures with draws of its own, and the bin it is of."""
        if not self.is_per_sample or self.module.control_variate is not None:
            return None
        groups, level = parameter_groups(self.module)[1], step % 2
        found = []
        for number, rank in enumerate(self.ranks):
            key = (SEED, number, "gradient variance", step)
            source = functools.partial(generator, *key)
            measurement = GradientMeasurement(DiffusionLoss(self.module), source, groups)
            some = self.clean(rank["batches"][step * WINDOW]["index"][:2])
            edges = {"low": level / 2, "high": (level + 1) / 2}
            parts = (
                measurement.per_sample(some, "whole"),
                measurement.per_sample(some, "level", **edges),
            )
            found.append([torch.stack(part) for part in parts])
        return [Components(*sum(parts) / len(parts)) for parts in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def run(no_pictures_in_module, tmp_path_factory):
    """What ranks have computed, and one process alone."""

    fit("plain", 1, tmp_path_factory.mktemp("warm"))  # imports what every fork would import again

    @functools.cache
    def trained(ranks, is_quick):
        names = [name for name in ESTIMATORS if ((name, ranks) in QUICK) == is_quick]
        folders = {name: tmp_path_factory.mktemp(name) for name in names}
        launch(lambda _: [fit(name, ranks, folders[name]) for name in names], ranks)
        return folders

    @functools.cache
    def both(name, ranks):
        found = read(trained(ranks, (name, ranks) in QUICK)[name], ranks)
        return found, Alone(name, found)

    return both


@pytest.fixture(scope="module")
def curve_of_one_process(no_pictures_in_module, tmp_path_factory):
    """The target variance that a trainer measures on one process, as it starts."""

    @functools.cache
    def curve(name):
        options = {"limit_train_batches": WINDOW, "limit_val_batches": 1}
        folder = tmp_path_factory.mktemp(name)
        fit(name, 1, folder, **options)
        return read(folder, 1)[0]["curve"]

    return curve


@every
def test_targets_and_losses_of_each_draw_are_those_of_one_process(name, ranks, run):
    found, alone = run(name, ranks)
    assert len(alone.batches) == WINDOW * STEPS
    for number, expected in enumerate(alone.batches):
        parts = [rank["batches"][number] for rank in found]
        noised = joined([part["noised"] for part in parts])
        assert torch.equal(noised["x0"], expected["x0"])
        torch.testing.assert_close(noised["xt"], expected["xt"], **ROUNDING)
        torch.testing.assert_close(noised["weight"], expected["weight"], **ROUNDING)
        target = joined([part["target"] for part in parts])
        torch.testing.assert_close(target, expected["target"], **ROUNDING)
        for quantity in ("per_draw", "control"):
            mine = joined([part[quantity] for part in parts])
            if mine is not None:
                torch.testing.assert_close(mine, expected[quantity].detach(), **ROUNDING)
        loss = torch.stack([part["loss"] for part in parts]).mean()
        torch.testing.assert_close(loss, expected["loss"], **ROUNDING)


@every
def test_gradients_weights_and_what_is_learned_are_those_of_one_process(name, ranks, run):
    found, alone = run(name, ranks)
    start = weights(build(name))
    for number, expected in enumerate(alone.steps):
        for rank in found:
            step = rank["steps"][number]
            for quantity in ("gradient", "weights", "table"):
                assert (step[quantity] is None) == (expected[quantity] is None)
                if step[quantity] is not None:
                    torch.testing.assert_close(step[quantity], expected[quantity], **ROUNDING)
                    assert torch.equal(step[quantity], found[0]["steps"][number][quantity])
    assert float((alone.steps[-1]["weights"] - start).norm()) > 0.01


@every
def test_no_two_ranks_batches_or_steps_have_a_time_or_a_noise_in_common(name, ranks, run):
    found, _ = run(name, ranks)
    assert {rank["seed"] for rank in found} == {SEED}
    parts = [batch["noised"] for rank in found for batch in rank["batches"]]
    for quantity in ("t", "noise"):
        drawn = torch.cat([part[quantity].flatten() for part in parts])
        assert len(drawn.unique()) == len(drawn)
    sources = {bytes(batch["source"].tolist()) for rank in found for batch in rank["batches"]}
    assert len(sources) == len(found) * WINDOW * STEPS


@on_ranks("strata", "learned")
def test_ranks_and_batches_of_a_step_cover_its_strata_once(name, ranks, run):
    found, alone = run(name, ranks)
    draws = alone.module.draws.resamples
    for step in range(STEPS if name == "strata" else 1):
        batches = [rank["batches"][step * WINDOW + i] for rank in found for i in range(WINDOW)]
        t = torch.stack([batch["noised"]["t"] for batch in batches])
        u = LogUniform(0.05, 5.0).cdf(t.double())
        assert (u.flatten() * u.numel()).long().sort().values.tolist() == list(range(u.numel()))
        of_sample = (u.reshape(-1, draws) * draws).long().sort(dim=1).values
        assert of_sample.tolist() == [list(range(draws))] * len(of_sample)


@on_ranks("classes")
def test_labels_are_dropped_by_each_rank_for_itself(name, ranks, run):
    found, _ = run(name, ranks)
    dropped = [
        torch.cat([batch["noised"]["group"] < 0 for batch in rank["batches"]]) for rank in found
    ]
    assert all(0 < int(mine.sum()) < len(mine) for mine in dropped)
    assert not torch.equal(dropped[0], dropped[1])


def assert_logged(ranks, expected, prefix):
    for rank in ranks:
        logged = {k: v for k, v in rank["numbers"].items() if k.startswith(prefix)}
        assert logged == pytest.approx(expected, rel=VARIANCE_ROUNDING, abs=1e-9)


@every
def test_all_ranks_log_the_same_numbers(name, ranks, run):
    found, _ = run(name, ranks)
    local = "train/loss"  # Lightning logs that of rank 0
    first, *others = [{k: v for k, v in rank["numbers"].items() if k != local} for rank in found]
    assert all(other == first for other in others)
    kinds = {name.split("/")[0] for name in first}
    assert kinds >= {"target_variance", "gradient_variance", "frechet_distance", "val"}


@every
def test_the_target_variance_is_measured_as_on_one_process(name, ranks, run, curve_of_one_process):
    found, alone = run(name, ranks)
    curve = TargetVarianceCurve.from_state(found[0]["curve"])
    single = TargetVarianceCurve.from_state(curve_of_one_process(name))
    torch.testing.assert_close(curve.noise_levels, single.noise_levels)
    # with the batch as references there are as many as a step of all ranks has
    assert curve.stf.keys() == single.stf.keys()
    for one, other in zip(curve.columns().values(), single.columns().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=VARIANCE_ROUNDING, atol=1e-9)

    removed = RemovedVariance(curve.noise_levels)
    for batch in alone.batches:
        removed.add(batch["noised"].noise_level, batch["target"]["spread"])
    expected = target_report.numbers(curve.noise_levels, {"removed": removed.means()})
    assert expected
    assert_logged(found, expected, "target_variance/removed/")


@on_ranks("plain", "all", "classes", "all-sharded")
def test_the_gradient_variance_is_the_mean_of_what_ranks_measure_apart(name, ranks, run):
    found, alone = run(name, ranks)
    levels = alone.module.schedule.noise_level(
        LogUniform(0.05, 5.0).icdf(torch.tensor([0.25, 0.75]))
    )
    statistics = GradientStatistics(parameter_groups(alone.module)[0], levels)
    for number, (whole, level) in enumerate(alone.components):
        statistics.add(whole, 0.9)
        statistics.add_level(number % 2, level, 0.9)
    expected = gradient_report.numbers(statistics) | gradient_report.points(statistics)
    assert {"gradient_variance/noise", "gradient_variance/total"} < set(expected)
    assert_logged(found, expected, "gradient_variance/")


def asked_of(name, classes, numbers):
    """Return labels and conditions of samples: those of validation data where it has both."""
    index = numbers % len(DATA)
    if name.startswith("angles"):
        return DATA.label[index], {"angle": 0.7 * (index % 3)}
    return None if classes is None else numbers % classes, None


@every
def test_the_frechet_distance_is_that_of_all_samples_in_one_process(name, ranks, run):
    found, alone = run(name, ranks)
    nn.utils.vector_to_parameters(found[0]["steps"][-1]["weights"], alone.module.parameters())
    metric = FrechetMetric(IdentityFeatures(2))
    metric.update(DATA.x0, real=True)
    for start in range(0, GENERATED, 250):
        count = min(250, GENERATED - start)
        numbers, source = torch.arange(start, start + count), generator(SEED, "frechet", start)
        group, cond = asked_of(name, alone.module.num_classes, numbers)
        samples = alone.module.sample(count, group=group, cond=cond, source=source)
        metric.update(samples, real=False)
    (key,) = [key for key in found[0]["numbers"] if key.startswith("frechet_distance/")]
    assert_logged(found, {key: float(metric.compute())}, "frechet_distance/")
