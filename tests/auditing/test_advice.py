"""What an audit advises, given what it measured."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from lightning_vr.auditing import Audit, Candidate, save_report
from lightning_vr.auditing.report import page, table
from lightning_vr.auditing.result import MeasuredEstimator
from lightning_vr.cli.vr_cli import VRCLI
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.proposals import LearnedProposal, TableProposal
from lightning_vr.estimators.stf import STF
from lightning_vr.lifecycle.configuration import describe
from lightning_vr.variance.accounting import CostModel
from lightning_vr.variance.intervals import Interval
from lightning_vr.variance.components import Components
from lightning_vr.variance.gradient_statistics import GradientStatistics


def components(data=1.0, timestep=2.0, noise=7.0, squared_mean=0.1):
    values = (data, timestep, noise, data + timestep + noise, squared_mean)
    return Components(*(torch.tensor([value], dtype=torch.float64) for value in values))


def measured(name, efficiency, seconds=0.01, width=0.05, config=None):
    parts = components(1 / efficiency, 2 / efficiency, 7 / efficiency)
    saved = Interval(efficiency, efficiency - width, efficiency + width)
    faster = 0.01 / seconds
    multiplier = Interval(*(faster * end for end in saved))
    return MeasuredEstimator(
        name, parts, components(0.1, 0.1, 0.1), seconds, saved, multiplier, config
    )


def current(squared_mean=0.1):
    one = Interval(1.0, 1.0, 1.0)
    parts = components(squared_mean=squared_mean)
    return MeasuredEstimator("current", parts, components(0.1, 0.1, 0.1), 0.01, one, one)


def an_audit(*rivals, squared_mean=0.1, upstream=1e-5, own=None, draws_per_sample=1, **settings):
    statistics = GradientStatistics(["all"], torch.tensor([0.1, 1.0]))
    statistics.add(Components(*(x.repeat(2) for x in components())))
    for level in range(2):
        statistics.add_level(level, components())
    cost = CostModel(1e-3, upstream, 1e-4)
    present = replace(current(squared_mean), config=own, draws_per_sample=draws_per_sample)
    estimators = [present, *rivals]
    return Audit(estimators, statistics, 10, cost, repetitions=50, seconds=12.0, **settings)


def test_the_candidate_with_the_largest_sure_multiplier_is_recommended():
    audit = an_audit(measured("a", 1.5), measured("b", 1.8), measured("c", 2.5, width=2.0))
    assert audit.recommended.name == "b"
    assert "Train with b" in audit.advice
    assert "1.80 times" in audit.advice
    assert "1.75 to 1.85" in audit.advice
    assert "left of it is 10 % data, 20 % timestep, 70 % noise" in audit.advice
    assert audit.advice.endswith("Training saves that at most.")


def test_less_variance_at_more_than_its_worth_does_not_pay():
    audit = an_audit(measured("dear", 1.5, seconds=0.02))
    assert audit.recommended is None
    assert audit.advice.startswith("Variance reduction does not pay here.")
    assert "33 %" in audit.advice
    assert "2.00 times as long" in audit.advice
    assert "70 % noise" in audit.advice
    assert audit.config == ""


def test_a_gain_below_five_percent_is_no_reason_to_change():
    assert an_audit(measured("a", 1.04, width=0.01)).recommended is None


def test_what_is_not_certain_is_said_to_be_so():
    advice = an_audit(measured("wide", 1.3, width=0.6)).advice
    assert "does not pay" in advice
    assert "not certain for wide" in advice
    assert "larger budget" in advice


def test_a_cheaper_estimator_of_equal_variance_is_no_variance_reduction():
    audit = an_audit(measured("plain", 1.0, seconds=0.005, width=0.01))
    assert audit.advice.startswith("Variance reduction does not pay here. Train with plain")
    assert "0.50 times as long" in audit.advice


def test_where_noise_is_no_bottleneck_the_advice_says_so():
    # V = 10 and B = 10 make the noise ratio 1 / squared_mean
    audit = an_audit(measured("a", 2.0), squared_mean=10.0)
    assert audit.noise_ratio == pytest.approx(0.1)
    assert "noise is not the bottleneck of this training" in audit.advice
    assert audit.predicted_speedup(audit.recommended) == pytest.approx(1.1 / 1.05)
    assert "1.05 times less compute" in audit.advice
    assert "not the bottleneck" not in an_audit(measured("a", 2.0)).advice
    # half the variance in 1.5 times as long: (1.5 * 1.05) / 1.1
    dear = an_audit(measured("dear", 2.0, seconds=0.015), squared_mean=10.0)
    assert "1.43 times more compute" in dear.advice


def test_a_longer_step_is_recommended_only_where_noise_is_what_holds_training_back():
    rivals = measured("longer", 4.0, seconds=0.017), measured("as long", 1.9)
    # ECM 2.35 and 1.9; with noise ratio 1/3: (4/3) / (1 + 1/12) / 1.7 = 0.72, and 1.13
    audit = an_audit(*rivals, squared_mean=3.0)
    assert audit.recommended.name == "as long"
    assert audit.predicted_speedup(audit.estimators[1]) == pytest.approx(16 / 13 / 1.7)
    assert an_audit(*rivals, squared_mean=0.01).recommended.name == "longer"
    alone = an_audit(rivals[0], squared_mean=3.0)
    assert "1.38 times more compute" in alone.advice


def test_more_noise_draws_per_sample_are_best_where_encoding_is_dear():
    assert an_audit(upstream=1e-6).resamples == (1, 1.0)
    assert "one noise draw per sample is best" in page(an_audit(upstream=1e-6))
    # K*² = (9 / 1) (9e-4 / 1e-4) = 81, and H(1) / H(9) = (1 + 9) (9 + 1) / ((1 + 1) (9 + 9))
    best, gain = an_audit(upstream=9e-4).resamples
    assert best == 9
    assert gain == pytest.approx(100 / 36)
    assert "9 noise draws per sample have an ECM of 2.78" in page(an_audit(upstream=9e-4))


def test_the_best_number_of_draws_does_not_depend_on_how_many_there_are_now():
    # the components are those of the mean of 4 draws: V_W is 4 * 9, K*² = 36 / 1 * 9e-4 / 1e-4
    best, gain = an_audit(upstream=9e-4, draws_per_sample=4).resamples
    assert best == 18
    # H(4) = (1 + 9) (9 + 4), H(18) = (1 + 2) (9 + 18), in units of 1e-4
    assert gain == pytest.approx(130 / 81)
    assert "18 noise draws per sample have an ECM of 1.60 over the present 4" in page(
        an_audit(upstream=9e-4, draws_per_sample=4)
    )
    # K*² = 36 * 1e-5 / 1e-4 < 6, and > 2: 2 is best, and H(4) / H(2) = (10 * 4.1) / (19 * 2.1)
    best, gain = an_audit(upstream=1e-5, draws_per_sample=4).resamples
    assert best == 2
    assert gain == pytest.approx(41 / 39.9)


def test_a_larger_batch_is_said_to_do_what_cheap_resamples_do():
    twice = replace(measured("2 resamples", 1.5), draws_per_sample=2)
    advice = an_audit(twice, upstream=1e-6).advice
    assert "Train with 2 resamples" in advice
    assert "a batch of 2 times as many samples would have even less variance" in advice
    assert "as many samples" not in an_audit(twice, upstream=9e-4).advice
    pairs = replace(measured("pairs", 2.5), draws_per_sample=2)
    assert "as many samples" not in an_audit(pairs, upstream=1e-6).advice


def test_antithetic_draws_are_counted_in_pairs():
    # V_W of a pair is 9, a pair costs 2e-4: K*² = 9 * 9 / 2, and 6 * 7 is the first above
    found = an_audit(upstream=9e-4, draws_per_sample=2, least_draws=2)
    best, gain = found.resamples
    assert best == 2 * 6
    # H(1) = (1 + 9) (9 + 2), H(6) = (1 + 9 / 6) (9 + 12)
    assert gain == pytest.approx(110 / 52.5)
    best, gain = an_audit(upstream=1e-6, draws_per_sample=2, least_draws=2).resamples
    assert (best, gain) == (2, 1.0)
    assert "2 noise draws per sample are best, as now" in page(
        an_audit(upstream=1e-6, draws_per_sample=2, least_draws=2)
    )


def parsed(tmp_path, *documents):
    """The module of configurations that are given one after the other."""
    flags = []
    for i, text in enumerate(documents):
        (tmp_path / f"{i}.yaml").write_text(text)
        flags += ["--config", str(tmp_path / f"{i}.yaml")]
    return VRCLI(args=flags, run=False).model


BASE = "model:\n  class_path: DiffusionModule\n  init_args:\n    network: ResidualMLP\n"


def test_the_lines_to_paste_select_the_estimator(tmp_path):
    config = {"target": describe(STF(64))}
    audit = an_audit(measured("STF(64)", 2.0, config=config))
    assert audit.config == (
        "model:\n  init_args:\n    target:\n      class_path: STF\n"
        "      init_args:\n        references: 64\n"
    )
    assert parsed(tmp_path, BASE, audit.config).target.references == 64


def test_the_lines_to_paste_name_draws_and_their_proposal(tmp_path):
    config = {"draws": describe(CARV(1, LearnedProposal()))}
    audit = an_audit(measured("strata", 2.0, config=config))
    assert audit.config == (
        "model:\n  init_args:\n    draws:\n      class_path: CARV\n      init_args:\n"
        "        resamples: 1\n        proposal:\n          class_path: LearnedProposal\n"
    )
    assert describe(parsed(tmp_path, BASE, audit.config).draws) == config["draws"]


@pytest.mark.parametrize(
    ("present", "better"),
    [
        (CARV(4, TableProposal([1.0, 2.0]), chunk_size=8), CARV(1)),
        (CARV(4, LearnedProposal(bins=8), scope="none"), CARV(1, LearnedProposal())),
        (CARV(2, antithetic=True), CARV(4)),
    ],
)
def test_pasted_lines_leave_nothing_of_present_draws_behind(tmp_path, present, better):
    own, config = {"draws": describe(present)}, {"draws": describe(better)}
    before = yaml.safe_dump({"model": {"init_args": own}})
    audit = an_audit(measured("better", 2.0, config=config), own=own)
    assert describe(parsed(tmp_path, BASE, before, audit.config).draws) == config["draws"]


def test_all_that_was_found_is_written(tmp_path):
    audit = an_audit(measured("a", 2.0), measured("b", 0.5))
    save_report(audit, tmp_path / "new")
    written = json.loads((tmp_path / "new/audit.json").read_text())
    assert written["recommended"] == "a"
    assert [each["name"] for each in written["estimators"]] == ["current", "a", "b"]
    assert written["estimators"][1]["multiplier"]["estimate"] == 2.0
    assert written["estimators"][0]["components"]["total"] == [10.0]
    assert (tmp_path / "new/audit.md").read_text() == page(audit)
    assert (tmp_path / "new/audit.png").stat().st_size > 10_000
    assert "| a | 5 ± 0.3 |" in page(audit)
    assert table(audit).row_count == 3


def test_what_is_not_finite_is_written_as_nothing(tmp_path):
    audit = an_audit(measured("a", 2.0), squared_mean=-1.0)
    save_report(audit, tmp_path)
    assert json.loads((tmp_path / "audit.json").read_text())["noise_ratio"] is None
    assert "too large to resolve" in page(audit)


def test_a_candidate_without_a_configuration_is_recommended_without_lines():
    assert an_audit(measured("own", 2.0)).config == ""
    assert Candidate("own", target=STF(8)).config() == {"target": describe(STF(8))}
