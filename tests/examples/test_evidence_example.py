"""The rows of the table of evidence: `pytest -m slow` runs each in its quick mode."""

import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_vr.variance.target_curves import MeasuredCurve, TargetVarianceCurve

EVIDENCE = Path(__file__).parents[2] / "examples/evidence"
ROWS = (
    "stf_variance",
    "stf_training",
    "stf_samplers",
    "carv_proposals",
    "carv_cost",
    "grids",
    "bell_weight",
    "taylor_optimizers",
    "combined",
    "prediction_gaps",
)
"""Those that train, sample or start processes."""


def run_rows(load, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    load("run").main()
    return capsys.readouterr().out


def test_every_row_has_a_script(load, monkeypatch, capsys):
    printed = run_rows(load, monkeypatch, capsys, "--list")
    for line in printed.splitlines():
        assert (EVIDENCE / f"{line.split(':')[0]}.py").exists(), line


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_control_of_the_objective_is_control_of_the_gradient(load, monkeypatch, capsys, tmp_path):
    arguments = ["--only", "taylor_equivalence", "--folder", tmp_path]
    printed = run_rows(load, monkeypatch, capsys, *arguments)
    errors = re.findall(r"largest difference (\S+)", printed)
    assert len(errors) == 3
    assert max(map(float, errors)) < 1e-13


def test_a_row_stops_at_its_budget_and_keeps_what_it_has(load, tmp_path):
    study = load("study")
    with pytest.raises(study.OutOfTimeError):
        study.Study(tmp_path, budget=0.0, started=-1.0).check_time()
    table = study.Table(tmp_path / "t.csv", ("arm", "seed"), ("loss",))
    table.add(arm="plain", seed=0, loss=0.5)
    again = study.Table(tmp_path / "t.csv", ("arm", "seed"), ("loss",))
    assert again.has("plain", 0)
    assert not again.has("plain", 1)
    assert again.select("loss", arm="plain") == [0.5]


def test_a_row_gets_a_model_of_more_steps_than_its_job_has(load, monkeypatch, tmp_path):
    models, study = load("digits_models"), load("study")
    monkeypatch.setattr(models, "STEPS", (1, 2))
    monkeypatch.setitem(models.JOBS, "short", models.Job(models.VE, steps=1))
    weights = [
        models.model("short", 0, step, study.Study(tmp_path))[0].state_dict() for step in (1, 2)
    ]
    assert any(not torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_parts_of_a_steps_cost_are_found(load):
    cost = load("carv_cost")
    seconds = cost.np.array([0.010 + 0.002 * r + 0.001 * r * k for r, k in cost.SIZES])
    found = cost.coefficients(seconds)
    assert found[2:5] == pytest.approx((10, 2, 1))
    assert found[5] == pytest.approx(0, abs=1e-6)
    assert found[1] > 20  # without the fixed part


def test_half_an_interval_is_that_of_students_t(load):
    mean, half = load("study").mean_and_half([1.0, 2.0, 4.5])
    assert mean == pytest.approx(2.5)
    assert half == pytest.approx(4.3027 * 1.8028 / 3**0.5, rel=1e-4)  # t of 2 degrees of freedom


def test_the_interval_of_a_ratio_of_deviations_is_that_of_the_f_test(load):
    # the quantile of F with 2 and 2 degrees of freedom is p / (1 - p), here 39
    said = load("stf_training").spread_below([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert said == ("1.00", f"10 ({10 / 39**0.5:.2g} to {10 * 39**0.5:.2g})")


def test_a_target_that_follows_the_law_is_seen_to(load):
    levels = torch.tensor([1.0, 10.0], dtype=torch.float64)
    curve = MeasuredCurve(levels**-2, 0 * levels)
    stf = {5: MeasuredCurve(curve.mean / 4, 0 * levels)}
    ones = MeasuredCurve(torch.ones_like(levels), 0 * levels)
    found = TargetVarianceCurve(levels, 100, curve, stf, {100: ones, 5: ones}, ones)
    row = load("stf_variance").law({"digits": found}).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == cells[3] == "1.00 ± 0.00"
    assert cells[4:6] == ["1", "4.00"]


def test_far_from_two_gaussians_the_law_holds(load):
    module = load("stf_variance")
    data = module.TwoGaussians()
    errors = [module.population_error(data, 16.0, 16, key) / 16.0**4 for key in range(100)]
    ratio = 15 * sum(errors) / 100 / float(data.target_variance(1.0, 16.0))
    assert 0.6 < ratio < 1.2


def test_a_control_variate_that_explains_half_of_the_variance_is_worth_two(load):
    ones = torch.ones(8, dtype=torch.float64)
    kept = {"own": ones, "cross": ones[:, None], "square": 2 * ones[:, None]}
    kept |= {"second": 3 * ones, "gram": torch.ones(8, 8, dtype=torch.float64)}
    module = load("taylor_mnist")
    assert module.factor(kept, 0, torch.arange(8)) == pytest.approx(2)
    # a variance of 2 in all, of which the noise makes 1
    bins = torch.arange(8) // 3
    assert module.whole(kept, 0, torch.arange(8), bins) == pytest.approx(2 / 1.5)


def test_predictions_are_compared_with_what_came_true(load, monkeypatch, capsys, tmp_path):
    header = "workload,candidate,is_recommended,predicted,low,high,noise_ratio,time_ratio,seed"
    rows = ["a,pairs,True,2.0,1.8,2.2,1,1,0,2.0,1.5", "a,pairs,True,2.0,1.8,2.2,1,1,1,2.0,1.5"]
    rows += ["b,pairs,True,3.0,2.8,3.2,1,1,0,1.5,1.5", "c,strata,False,1.1,0.9,1.3,1,1,0,1.0,1.0"]
    (tmp_path / "results.csv").write_text("\n".join([header + ",realised,fixed_decay", *rows]))
    arguments = ["--only", "predictions", "--predictions", tmp_path / "results.csv"]
    printed = run_rows(load, monkeypatch, capsys, *arguments, "--folder", tmp_path)
    assert "by length 0.1: 2 of 3, of the recommended 1 of 2" in printed
    assert "by decay 0.98: 1 of 3, of the recommended 0 of 2" in printed
    assert "| c | strata | no | 1.10 (0.90 to 1.30) |" in printed
    assert (tmp_path / "predictions.png").stat().st_size > 10_000


def test_a_candidate_on_the_plain_runs_path_saves_the_harmonic_mean(load):
    along = load("prediction_gaps").along
    assert along([0.25, 0.75], *[[1.0, 3.0]] * 3) == "1.50 (1.50 to 1.50)"
    # of four equal logarithmic errors half an error is left
    points = [0.125, 0.375, 0.625, 0.875]
    assert along(points, [4.0] * 4, [1.0] * 4, [16.0] * 4) == "4.00 (2.00 to 8.00)"


def test_learning_rates_are_each_arms_own(load, tmp_path):
    gaps = load("prediction_gaps")
    keys = ("job", "arm", "factor", "seed")
    table = load("study").Table(tmp_path / "t.csv", keys, [gaps.JUDGE])
    needed = {("plain", 1.0): 300, ("plain", 0.3): 200, ("recommended", 1.0): 100}
    for (arm, factor), steps in (needed | {("recommended", 3.0): 40}).items():
        table.add(job="a", arm=arm, factor=factor, seed=0, **{gaps.JUDGE: steps})
    assert gaps.fewer_steps(table, "a", "0", gaps.JUDGE) == pytest.approx(3)
    assert gaps.fewer_steps(table, "a", "0", gaps.JUDGE, is_tuned=True) == pytest.approx(5)
    assert gaps.best_factors(table, "a") == "× 0.3, × 3"


def test_a_check_that_fails_ends_the_call_with_its_message(load, monkeypatch, tmp_path):
    def run(study):
        raise load("study").CheckFailedError("2 commands failed.")

    monkeypatch.setattr(load("readmes"), "run", run)
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "readmes", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"readmes: 2 commands failed\."):
        load("run").main()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("row", ROWS)
def test_a_row_runs(row, load, monkeypatch, capsys, tmp_path):
    arguments = ["--only", row, "--quick", "--folder", tmp_path]
    printed = run_rows(load, monkeypatch, capsys, *arguments)
    assert printed.count("| ") > 10
    assert "used up" not in printed
