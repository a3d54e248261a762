"""The table of an evaluation: what is in it, its errors, its cache, and what is refused."""

import csv
import json
import statistics

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.gaussian_reverse import TwoHalves, scheduler
from support.held_out import TrainAndTest
from support.networks import small_mlp
from support.points import Points, normal_points
from support.trainers import quiet_trainer

from lightning_vr import (
    DDPM,
    DiffusionModule,
    Evaluation,
    FrechetDistance,
    LearnedVariance,
    Likelihood,
    Sampler,
    VariationalBound,
)
from lightning_vr.callbacks import held_out_likelihood
from lightning_vr.core.rng import generator
from lightning_vr.metrics import (
    Features,
    frechet_distance,
    kernel_distance,
    memorisation,
    precision_recall,
)

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory")

TRAIN, TEST = normal_points(200, "train"), normal_points(60, "test")
FEW = {"samples": 60, "repeats": 2, "subsets": 5, "subset_size": 20, "likelihood_samples": 10}
ALL = ["frechet_distance", "kid", "precision", "recall", "memorisation", "bits_per_dimension"]
OF_SAMPLES = ALL[:-1]


class Reads(Points):
    """Points that count how often one is read."""

    reads = 0

    def __getitem__(self, i):
        Reads.reads += 1
        return super().__getitem__(i)


class Sampled(LightningModule):
    """A module that is not ours: it has nothing but data."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["x0"]).square().mean()

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def points(train=TRAIN, test=TEST):
    return TrainAndTest(Reads(train), Points(test))


def diffusion():
    return DiffusionModule(small_mlp(std=0.3), sampler=Sampler(steps=3))


def evaluated(callback, folder, model=None, data=None, **options):
    seed_everything(1, verbose=False)
    trainer = quiet_trainer(callback, logger=CSVLogger(folder, name="", version=""), **options)
    trainer.test(model or diffusion(), datamodule=data or points(), verbose=False)
    return trainer


def normal(module, count):
    """New draws of the training set's distribution."""
    return torch.randn(count, 2)


def by_sampling(draw, **settings):
    options = {"measures": OF_SAMPLES, "sample": draw, "clean": lambda batch: batch["x0"]}
    return Evaluation(**(FEW | options | settings))


def test_a_test_writes_all_measures_to_three_files_with_the_same_numbers(tmp_path, capsys):
    callback = Evaluation(**FEW)
    trainer = evaluated(callback, tmp_path)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["measure"] for row in found] == ALL
    with (tmp_path / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    page = (tmp_path / "evaluation.md").read_text()
    assert page in capsys.readouterr().out
    for row, line, shown in zip(found, rows, page.splitlines()[2:], strict=True):
        assert float(line["value"]) == row["value"]
        assert float(line["standard error"]) == row["standard_error"]
        cells = [cell.strip() for cell in shown.strip("|").split("|")]
        assert cells[1:3] == [f"{row['value']:.4g}", f"{row['standard_error']:.4g}"]
    assert "features identity" in page
    logged = trainer.callback_metrics
    assert float(logged["evaluation/kid/identity_n60"]) == pytest.approx(found[1]["value"])
    assert float(logged["evaluation/bits_per_dimension"]) == pytest.approx(found[-1]["value"])


def test_each_measure_is_that_of_its_own_function_and_errors_are_those_of_the_sets(tmp_path):
    sets = normal_points(180, "sets").split(60)
    remaining = iter(sets)
    callback = by_sampling(lambda module, count: next(remaining), repeats=3)
    evaluated(callback, tmp_path, Sampled())
    moments = [(x.double().mean(0), torch.cov(x.double().T)) for x in (TRAIN, *sets)]
    chosen = TRAIN[torch.arange(60) * 200 // 60]
    pairs = [precision_recall(chosen, each) for each in sets]
    expected = {
        "frechet_distance": [float(frechet_distance(*moments[0], *m)) for m in moments[1:]],
        "kid": [
            kernel_distance(TRAIN, x, generator("kernel distance", i), subsets=5, subset_size=20)
            for i, x in enumerate(sets)
        ],
        "precision": [pair[0] for pair in pairs],
        "recall": [pair[1] for pair in pairs],
        "memorisation": memorisation(TRAIN, TEST, sets).fractions,
    }
    for row in callback.found:
        values = expected.pop(row.measure)
        assert row.value == pytest.approx(statistics.mean(values), rel=1e-9)
        assert row.standard_error == pytest.approx(statistics.stdev(values) / 3**0.5, rel=1e-9)
        assert (row.samples, row.repeats) == (60, 3)
    assert not expected


def test_the_standard_error_is_the_spread_of_repeated_evaluations(tmp_path):
    means, errors = [], []
    for i in range(20):
        torch.manual_seed(i)
        sets = iter(torch.randn(4, 60, 2))
        callback = by_sampling(
            lambda module, count, sets=sets: next(sets), repeats=4, measures=["frechet_distance"]
        )
        evaluated(callback, tmp_path, Sampled())
        means.append(callback.found[0].value)
        errors.append(callback.found[0].standard_error ** 2)
    ratio = statistics.mean(errors) / statistics.variance(means)
    assert 0.4 < ratio < 2.5  # chi-squared with 19 degrees of freedom: 3 standard errors


def test_one_set_has_no_standard_error(tmp_path):
    callback = by_sampling(normal, repeats=1, measures=["kid"])
    evaluated(callback, tmp_path, Sampled())
    assert callback.found[0].standard_error is None
    assert json.loads((tmp_path / "evaluation.json").read_text())[0]["standard_error"] is None
    assert (tmp_path / "evaluation.csv").read_text().splitlines()[1].split(",")[2] == ""


def test_sets_of_samples_are_disjoint(tmp_path):
    seen = []

    class Watched(DiffusionModule):
        def sample(self, count, *, source, **options):
            seen.append(torch.randn(count, 2, generator=source))
            return seen[-1]

    evaluated(Evaluation(**FEW, measures=["precision"]), tmp_path, Watched(small_mlp()))
    assert len(torch.cat(seen).unique(dim=0)) == 120


def test_copies_of_training_samples_are_warned_of_and_new_samples_are_not(tmp_path):
    evaluated(by_sampling(normal), tmp_path, Sampled())  # a warning would be an error
    copies = by_sampling(lambda module, count: TRAIN[:count] + 1e-4)
    with pytest.warns(UserWarning, match=r"100.0 % of them lie within .* 4.9 % would without"):
        evaluated(copies, tmp_path, Sampled())


def test_held_out_data_that_was_trained_on_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="held-out samples are training samples"):
        evaluated(by_sampling(normal), tmp_path, Sampled(), points(test=TRAIN[:60]))


def test_bits_per_dimension_do_not_depend_on_blocks_but_for_the_tolerance(tmp_path, monkeypatch):
    values = []
    for block in (64, 7):
        monkeypatch.setattr(held_out_likelihood, "_BLOCK", block)
        likelihood = Likelihood(tolerance=1e-5)
        callback = Evaluation(["bits_per_dimension"], likelihood=likelihood, likelihood_samples=10)
        evaluated(callback, tmp_path)
        values.append(callback.found[0].value)
        assert callback.found[0].samples == 10
    assert values[0] == pytest.approx(values[1], abs=1e-3)


def test_mixed_precision_leaves_the_likelihood_alone_and_half_precision_is_refused(tmp_path):
    values = []
    for precision in ("32-true", "bf16-mixed"):
        callback = Evaluation(["bits_per_dimension"], likelihood_samples=10)
        evaluated(callback, tmp_path, precision=precision)
        values.append(callback.found[0].value)
    assert values[0] == values[1]
    with pytest.raises(MisconfigurationException, match=r"in float32 .* got torch.bfloat16"):
        evaluated(Evaluation(["bits_per_dimension"]), tmp_path, precision="bf16-true")


def cached(tmp_path, **settings):
    """Evaluate with a cache; return the numbers and how many training samples were read."""
    callback = by_sampling(normal, cache=tmp_path / "cache", **settings)
    Reads.reads = 0
    evaluated(callback, tmp_path, Sampled())
    return [(row.value, row.standard_error) for row in callback.found], Reads.reads


def test_a_cached_training_set_gives_bitwise_the_same_and_is_not_read_again(tmp_path):
    first, reads = cached(tmp_path)
    again, few = cached(tmp_path)
    assert again == first
    assert reads == 1 + 16 + 200
    assert few == 1 + 16  # a check of its shape, and the probes
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_frechet_distance_takes_the_same_features_from_the_same_folder(tmp_path):
    drawn, values, reads = normal_points(60, "drawn"), [], []
    given = {"sample": lambda module, count: drawn, "clean": lambda batch: batch["x0"]}
    cached(tmp_path)
    for cache in (None, tmp_path / "cache", tmp_path / "another"):
        callback, Reads.reads = FrechetDistance(samples=60, cache=cache, **given), 0
        trainer = evaluated(callback, tmp_path, Sampled())
        values.append(float(trainer.callback_metrics["frechet_distance/identity_n60"]))
        reads.append(Reads.reads)
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)
    assert reads == [1 + 200, 1 + 16, 1 + 16 + 200]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "text", "others", "not finite"])
def test_a_damaged_or_foreign_file_is_told_of_and_replaced(tmp_path, damage):
    first, _ = cached(tmp_path)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    if damage in ("foreign", "others", "not finite"):
        with np.load(path) as file:
            content = dict(file)
        if damage == "foreign":
            content["identity"] = np.array("another")
        elif damage == "others":
            content["probes"] = content["probes"][::-1]
        else:
            content["features"][3] = np.nan
        np.savez(path, **content)
    else:
        middle = whole.index(b"features.npy") + 300
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"cut": whole[:500], "flipped": flipped, "text": b"none"}[damage])
    with pytest.warns(UserWarning, match=r"reference statistics .* are not used"):
        again, reads = cached(tmp_path)
    assert again == first
    assert reads == 1 + 16 + 200
    assert cached(tmp_path) == (first, 1 + 16)


def test_other_data_and_other_features_are_not_taken_for_those_on_disk(tmp_path):
    cached(tmp_path)
    doubled = Features(torch.nn.Linear(2, 2), 2, "identity")
    cached(tmp_path, features=doubled)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the weights are in the name
    callback = by_sampling(normal, cache=tmp_path / "cache")
    with pytest.warns(UserWarning, match=r"features of 16 samples .* no longer the same"):
        evaluated(callback, tmp_path, Sampled(), points(train=TRAIN + 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 19}, "`subset_size` must be at most 19, .* got 20"),
        ({"samples": 2, "subset_size": 2}, "`samples` must be more than 2, the number of features"),
        ({"real_samples": 10}, "`subset_size` must be at most 10"),
    ],
)
def test_too_few_samples_are_refused_with_numbers_before_the_test(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluated(by_sampling(normal, **settings), tmp_path, Sampled())


def test_too_little_data_is_refused_with_numbers_before_the_test(tmp_path):
    with pytest.raises(ValueError, match=r"training set must have at least 20 samples .* got 15"):
        evaluated(by_sampling(normal), tmp_path, Sampled(), points(train=TRAIN[:15]))
    with pytest.raises(ValueError, match=r"at least 20 held-out samples .* got 10"):
        evaluated(by_sampling(normal), tmp_path, Sampled(), points(test=TEST[:10]))


def bounded(**options):
    """A model of a table of 20 timesteps whose network says something about the variance."""
    sampler = Sampler(DDPM("beta"), steps=4)
    own = {"schedule": scheduler(20), "prediction": "epsilon", "sampler": sampler}
    return DiffusionModule(TwoHalves(), **(own | options))


def test_the_bound_is_that_of_its_own_class_with_a_learned_variance_and_with_fixed_ones(tmp_path):
    module, bound = bounded(variance=LearnedVariance()), VariationalBound(steps=5)
    settings = {"likelihood_samples": 10, "bound": bound}
    callback = Evaluation(["variational_bound"], **settings)
    trainer = evaluated(callback, tmp_path, module)
    x0, source = TEST[torch.arange(10) * 60 // 10], generator(module.run_seed, "bound", 0)
    estimate = module.eval().reverse_estimate
    expected = bound.bits_per_dimension(estimate, module.schedule, x0, source)
    for row, (variance, values) in zip(callback.found, expected.items(), strict=True):
        assert row.settings == {"variance": variance, "steps": 5, "clip_sample": False}
        assert row.value == pytest.approx(float(values.mean()), rel=1e-9)
        error = float(values.std()) / 10**0.5
        assert row.standard_error == pytest.approx(error, rel=1e-6)
        assert row.evaluations == 5  # one call of the network for all of them
        logged = trainer.callback_metrics[f"evaluation/variational_bound/{variance}"]
        assert float(logged) == pytest.approx(row.value)


def test_a_table_of_timesteps_is_evaluated_with_the_bound_of_fixed_variances(tmp_path):
    callback = Evaluation(**FEW)
    evaluated(callback, tmp_path, bounded())
    assert [row.measure for row in callback.found] == [*ALL, *["variational_bound"] * 2]
    assert [row.settings.get("variance") for row in callback.found[-2:]] == ["beta", "beta_tilde"]
    assert callback.found[-1].settings["steps"] == 20  # all of them
    with pytest.raises(ValueError, match="`schedule` must be a table of timesteps"):
        evaluated(Evaluation(["variational_bound"]), tmp_path)


def test_each_row_says_what_it_costs(tmp_path):
    callback = Evaluation(**FEW)
    evaluated(callback, tmp_path)
    *of_samples, likelihood = callback.found
    assert {row.evaluations for row in of_samples} == {5}  # three levels by Heun's method
    assert likelihood.evaluations > 10
    assert all(row.seconds > 0 for row in callback.found)
    with (tmp_path / "evaluation.csv").open() as file:
        for line, row in zip(csv.DictReader(file), callback.found, strict=True):
            assert float(line["seconds"]) == row.seconds
            assert line["network evaluations"] == str(row.evaluations)
    foreign = by_sampling(normal, measures=["kid"])
    evaluated(foreign, tmp_path, Sampled())
    assert foreign.found[0].evaluations is None


def test_wrong_measures_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`measures` must be 'frechet_distance'.* got 'fid'"):
        Evaluation(["fid"])
    with pytest.raises(MisconfigurationException, match="'bits_per_dimension' for a Sampled"):
        evaluated(by_sampling(normal, measures=ALL), tmp_path, Sampled())
