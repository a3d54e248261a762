"""What an audit advises, given what it measured."""

import json
from dataclasses import replace

import pytest
from support.audits import an_audit, around, components, cost_of, first_look_only, measured

from lightning_vr.auditing import Candidate, save_report
from lightning_vr.auditing.report import page, table
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.stf import STF
from lightning_vr.lifecycle.configuration import describe


def test_the_finalist_that_surely_saves_most_is_recommended():
    audit = an_audit(measured("a", 1.5), measured("b", 1.8), measured("c", 2.5, width=2.0))
    assert audit.recommended.name == "b"
    # (1 + 10) / (1 + 10 / 1.8)
    assert audit.advice.startswith("Train with b: the noise-ratio model of McCandlish et al.")
    assert "expects 1.68 times less compute for the same loss" in audit.advice
    assert "(95 % interval 1.63 to 1.73; 1.58 to 1.78 for all 3 finalists at once)" in audit.advice
    assert "at 1.80 times the compute (1.75 to 1.85)" in audit.advice
    assert "left of it is 10 % data, 20 % timestep, 70 % noise" in audit.advice


def test_what_was_not_measured_again_is_not_recommended():
    audit = an_audit(first_look_only(measured("lucky", 3.0)), measured("sure", 1.5))
    assert audit.recommended.name == "sure"
    assert an_audit(first_look_only(measured("lucky", 3.0))).recommended is None


def test_the_interval_for_all_finalists_at_once_decides():
    # 1.1 ± 0.06 alone and ± 0.12 with the others
    audit = an_audit(measured("close", 1.11, width=0.06))
    assert audit.estimators[1].predicted_speedup.low > 1 > audit.estimators[1].simultaneous.low
    assert audit.recommended is None


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
    rivals = [measured(f"wide {i}", 1.3 - i / 100, width=0.6) for i in range(5)]
    advice = an_audit(*rivals).advice
    assert advice.startswith("Whether variance reduction pays here is not certain.")
    assert 'Open are "wide 0", "wide 1", "wide 2" and 2 more: measure longer' in advice
    nearly = an_audit(measured("nearly", 1.0, width=0.1)).advice
    assert nearly.startswith("Variance reduction does not pay here.")
    assert 'Open are "nearly"' in nearly


def test_a_gradient_without_variance_is_said_to_be_one():
    nothing = an_audit(replace(measured("a", 1.0), multiplier=around(float("nan"), 0.0)))
    still = replace(nothing.current, components=components(0.0, 0.0, 0.0, 0.0))
    advice = replace(nothing, estimators=[still, *nothing.estimators[1:]]).advice
    assert "The gradient has no variance at these weights" in advice
    assert "nan" not in advice


def test_a_cheaper_estimator_of_equal_variance_is_no_variance_reduction():
    audit = an_audit(measured("plain", 1.0, seconds=0.005, width=0.01))
    assert audit.advice.startswith("Variance reduction does not pay here. Train with plain")
    assert "0.50 times as long" in audit.advice


def test_whatever_the_multiplier_no_more_compute_is_recommended():
    """ECM 2.35; with noise ratio 1/3: (4/3) / (1 + 1/12) / 1.7 = 0.72."""
    rivals = [
        measured("longer", 4.0, seconds=0.017, noise_ratio=1 / 3),
        measured("as long", 1.9, noise_ratio=1 / 3),
    ]
    audit = an_audit(*rivals, noise_ratio=1 / 3)
    assert audit.recommended.name == "as long"
    alone = an_audit(rivals[0], noise_ratio=1 / 3)
    assert alone.recommended is None
    assert alone.advice.startswith("Variance reduction does not pay here. Of the candidates longer")
    assert "largest ECM, 2.35" in alone.advice
    assert "expects 1.38 times more compute for the same loss" in alone.advice
    assert "0.33 times as much noise as signal" in alone.advice
    noisy = an_audit(*(measured(n, e, s) for n, e, s in (("longer", 4.0, 0.017), ("b", 1.9, 0.01))))
    assert noisy.recommended.name == "longer"


def test_more_noise_draws_per_sample_are_best_where_encoding_is_dear():
    assert an_audit(upstream=1e-6).resamples == (1, 1.0)
    assert "one noise draw per sample is best" in page(an_audit(upstream=1e-6))
    # K*² = (9 / 1) (9e-4 / 1e-4) = 81, and H(1) / H(9) = (1 + 9) (9 + 1) / ((1 + 1) (9 + 9))
    best, gain = an_audit(upstream=9e-4).resamples
    assert best == 9
    assert gain == pytest.approx(100 / 36)
    assert "9 noise draws per sample have an ECM of 2.78" in page(an_audit(upstream=9e-4))


@pytest.mark.parametrize("denoise", [(0.0, 0.0, 0.0), (-1e-6, -2e-5, 1e-5), (1e-5, -1e-5, 3e-5)])
def test_a_cost_that_is_not_resolved_gives_no_number_of_draws(tmp_path, denoise):
    audit = an_audit(cost=cost_of(1e-5, denoise))
    assert audit.resamples is None
    assert "draws per sample are best is not resolved" in page(audit)
    save_report(audit, tmp_path)
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["resamples"] is None
    assert written["cost"]["denoise"]["low"] == denoise[1]
    # whatever a draw costs, more do not pay if encoding costs nothing
    assert an_audit(cost=cost_of(0.0, denoise)).resamples == (1, 1.0)


def test_data_variance_that_is_not_resolved_counts_as_its_error():
    parts, errors = components(-1.0), components(0.25)
    audit = an_audit(upstream=9e-4)
    none = replace(audit.current, components=parts, errors=errors)
    # K*² = 9 / 0.25 * 9
    assert replace(audit, estimators=[none]).resamples[0] == 18


def test_the_best_number_of_draws_does_not_depend_on_how_many_there_are_now():
    # the components are those of the mean of 4 draws: V_W is 4 * 9, K*² = 36 / 1 * 9e-4 / 1e-4
    best, gain = an_audit(upstream=9e-4, draws=4).resamples
    assert best == 18
    # H(4) = (1 + 9) (9 + 4), H(18) = (1 + 2) (9 + 18), in units of 1e-4
    assert gain == pytest.approx(130 / 81)
    assert "18 noise draws per sample have an ECM of 1.60 over the present 4" in page(
        an_audit(upstream=9e-4, draws=4)
    )
    # K*² = 36 * 1e-5 / 1e-4 < 6, and > 2: 2 is best, and H(4) / H(2) = (10 * 4.1) / (19 * 2.1)
    best, gain = an_audit(upstream=1e-5, draws=4).resamples
    assert best == 2
    assert gain == pytest.approx(41 / 39.9)


def test_a_larger_batch_is_said_to_do_what_cheap_resamples_do():
    config = {"draws": describe(CARV(2))}
    twice = measured("2 resamples", 1.5, config=config, draws=2)
    advice = an_audit(twice, upstream=1e-6).advice
    assert "Train with 2 resamples" in advice
    assert "its draws alone divide the variance by 1.50" in advice
    assert "a batch of 2 times as many samples would divide it by 2" in advice
    assert "as many samples" not in an_audit(twice, upstream=9e-4).advice
    pairs = measured("pairs", 2.5, config=config, draws=2)
    assert "as many samples" not in an_audit(pairs, upstream=1e-6).advice


def test_a_larger_batch_is_compared_with_draws_at_the_same_target():
    target = {"target": describe(STF(64))}
    both = target | {"draws": describe(CARV(4))}
    # 14 in all, of which STF gives 5: the draws alone give 2.8 of the 4 of a larger batch
    stf = measured("STF", 5.0, config=target)
    combined = measured("STF, 4 resamples", 14.0, config=both, draws=4)
    advice = an_audit(stf, combined, upstream=1e-6).advice
    assert "its draws alone divide the variance by 2.80" in advice
    assert "a batch of 4 times as many samples" in advice
    better = an_audit(replace(stf, efficiency=around(3.0, 0.1)), combined, upstream=1e-6)
    assert "as many samples" not in better.advice
    # the first look chose it for its luck
    for unknown in ([], [first_look_only(stf)]):
        assert "as many samples" not in an_audit(*unknown, combined, upstream=1e-6).advice


def test_antithetic_draws_are_counted_in_pairs():
    # V_W of a pair is 9, a pair costs 2e-4: K*² = 9 * 9 / 2, and 6 * 7 is the first above
    found = an_audit(upstream=9e-4, draws=2, least_draws=2)
    best, gain = found.resamples
    assert best == 2 * 6
    # H(1) = (1 + 9) (9 + 2), H(6) = (1 + 9 / 6) (9 + 12)
    assert gain == pytest.approx(110 / 52.5)
    best, gain = an_audit(upstream=1e-6, draws=2, least_draws=2).resamples
    assert (best, gain) == (2, 1.0)
    assert "2 noise draws per sample are best, as now" in page(
        an_audit(upstream=1e-6, draws=2, least_draws=2)
    )


def test_all_that_was_found_is_written(tmp_path):
    audit = an_audit(measured("a", 2.0), measured("b", 0.5))
    save_report(audit, tmp_path / "new")
    written = json.loads((tmp_path / "new/audit.json").read_text())
    assert written["recommended"] == "a"
    assert [each["name"] for each in written["estimators"]] == ["current", "a", "b"]
    assert written["estimators"][1]["multiplier"]["estimate"] == 2.0
    assert written["estimators"][0]["components"]["total"] == [10.0]
    assert (
        written["estimators"][1]["simultaneous"]["low"]
        < written["estimators"][1]["predicted_speedup"]["low"]
    )
    assert (tmp_path / "new/audit.md").read_text() == page(audit)
    assert (tmp_path / "new/audit.png").stat().st_size > 10_000
    assert "| a * | 5 ± 0.3 | 10/20/70 |" in page(audit)
    assert table(audit).row_count == 3


def test_an_estimator_without_noise_has_no_parts():
    still = replace(measured("still", 2.0), components=components(0.0, 0.0, 0.0))
    assert "| still * | 0 ± 0.3 | 0/0/0 |" in page(an_audit(still))


def test_what_is_not_finite_is_written_as_nothing(tmp_path):
    audit = an_audit(measured("a", 2.0), noise_ratio=-1.0)
    save_report(audit, tmp_path)
    assert json.loads((tmp_path / "audit.json").read_text())["noise_ratio"] is None
    assert "too large to resolve" in page(audit)


def test_a_candidate_without_a_configuration_is_recommended_without_lines():
    assert an_audit(measured("own", 2.0)).config == ""
    assert Candidate("own", target=STF(8)).config() == {"target": describe(STF(8))}


def test_what_could_not_be_measured_is_printed():
    audit = an_audit(measured("a", 2.0), skipped={"b": "it is too large"})
    assert "Not measured: b: it is too large." in page(audit)
