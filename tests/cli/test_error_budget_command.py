"""``error_budget`` on the command line: a trained run, its sampler, and another one."""

import json

from commands import POINTS


def test_a_budget_writes_its_findings_and_prints_advice(run, capsys):
    run("fit")
    data = [*POINTS, "--data.num_samples=64", "--data.batch_size=32"]
    folder = run(
        "error_budget",
        *("--ckpt_path=last", "--samples=8", "--sampler.solver=Euler", "--sampler.steps=3"),
        data=data,
    )
    found = json.loads((folder / "error_budget.json").read_text())
    assert found["solver"] == "Euler"
    assert len(found["grids"]["own"]["steps"]) == 3
    assert len(found["grids"]["twice the steps"]["steps"]) == 6
    printed = " ".join(capsys.readouterr().out.split())
    assert found["advice"] in printed
    for suffix in ("csv", "md", "png"):
        assert (folder / f"error_budget.{suffix}").stat().st_size > 0


def test_a_budget_without_data_is_refused(refused):
    assert "`data` must be configured" in refused("error_budget", data=[])
