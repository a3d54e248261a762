"""What an audit advises, given what it measured."""

import json

import pytest
import torch
import yaml

from lightning_vr.auditing import Audit, Candidate
from lightning_vr.auditing.report import page, table
from lightning_vr.auditing.result import Measured
from lightning_vr.cli.command import VRCLI
from lightning_vr.configuration import describe
from lightning_vr.estimators.stf import STF
from lightning_vr.variance.accounting import CostModel
from lightning_vr.variance.bootstrap import Interval
from lightning_vr.variance.components import Components
from lightning_vr.variance.statistics import GradientStatistics


def components(data=1.0, timestep=2.0, noise=7.0, squared_mean=0.1):
    values = (data, timestep, noise, data + timestep + noise, squared_mean)
    return Components(*(torch.tensor([value], dtype=torch.float64) for value in values))


def measured(name, efficiency, seconds=0.01, width=0.05, config=None):
    parts = components(1 / efficiency, 2 / efficiency, 7 / efficiency)
    saved = Interval(efficiency, efficiency - width, efficiency + width)
    faster = 0.01 / seconds
    multiplier = Interval(*(faster * end for end in saved))
    return Measured(name, parts, components(0.1, 0.1, 0.1), seconds, saved, multiplier, config)


def current(squared_mean=0.1):
    one = Interval(1.0, 1.0, 1.0)
    parts = components(squared_mean=squared_mean)
    return Measured("current", parts, components(0.1, 0.1, 0.1), 0.01, one, one)


def an_audit(*rivals, squared_mean=0.1, upstream=1e-5):
    statistics = GradientStatistics(["all"], torch.tensor([0.1, 1.0]))
    statistics.add(Components(*(x.repeat(2) for x in components())))
    for level in range(2):
        statistics.add_level(level, components())
    cost = CostModel(1e-3, upstream, 1e-4)
    estimators = [current(squared_mean), *rivals]
    return Audit(estimators, statistics, 10, cost, repetitions=50, seconds=12.0)


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
    assert "noise is not what holds this training back" in audit.advice
    assert audit.saving(audit.recommended) == pytest.approx(1.1 / 1.05)
    assert "not what holds" not in an_audit(measured("a", 2.0)).advice


def test_more_noise_draws_per_sample_are_best_where_encoding_is_dear():
    assert an_audit(upstream=1e-6).resamples == (1, 1.0)
    assert "one noise draw per sample is best" in page(an_audit(upstream=1e-6))
    # K*² = (9 / 1) (9e-4 / 1e-4) = 81, and H(1) / H(9) = (1 + 9) (9 + 1) / ((1 + 1) (9 + 9))
    best, gain = an_audit(upstream=9e-4).resamples
    assert best == 9
    assert gain == pytest.approx(100 / 36)
    assert "9 noise draws per sample have an ECM of 2.78" in page(an_audit(upstream=9e-4))


def test_the_lines_to_paste_select_the_estimator(tmp_path):
    config = {"target": describe(STF(64))}
    audit = an_audit(measured("STF(64)", 2.0, config=config))
    assert audit.config == (
        "model:\n  init_args:\n    target:\n      class_path: STF\n"
        "      init_args:\n        references: 64\n"
    )
    settings = yaml.safe_load(audit.config)
    settings["model"] |= {"class_path": "DiffusionModule"}
    settings["model"]["init_args"]["network"] = {"class_path": "MLP"}
    (tmp_path / "pasted.yaml").write_text(yaml.safe_dump(settings))
    cli = VRCLI(args=["--config", str(tmp_path / "pasted.yaml")], run=False)
    assert cli.model.target.references == 64


def test_all_that_was_found_is_written(tmp_path):
    audit = an_audit(measured("a", 2.0), measured("b", 0.5))
    audit.save(tmp_path / "new")
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
    audit.save(tmp_path)
    assert json.loads((tmp_path / "audit.json").read_text())["noise_ratio"] is None
    assert "too large to tell" in page(audit)


def test_a_candidate_without_a_configuration_is_recommended_without_lines():
    assert an_audit(measured("own", 2.0)).config == ""
    assert Candidate("own", target=STF(8)).config() == {"target": describe(STF(8))}
