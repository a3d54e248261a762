"""``audit`` on the command line: any configuration that ``fit`` takes."""

import json

import pytest
import torch
import yaml
from commands import write
from support.audits import counted_looks

from lightning_vr.cli import main, vr_trainer

BUDGET = "--budget=0.5"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few references, as there are few samples."""
    monkeypatch.setattr("lightning_vr.auditing.default_candidates._REFERENCES", (64,))


def test_an_audit_writes_its_findings_and_prints_advice(run, capsys, caplog):
    caplog.set_level("INFO")
    with counted_looks():
        folder = run("audit", "--budget=12")
    found = json.loads((folder / "audit.json").read_text())
    names = [each["name"] for each in found["estimators"]]
    singles = ["current", "STF(64)", "strata, q learned", "pairs"]
    assert names[: len(singles)] == singles
    again = [each["name"] for each in found["estimators"] if each["simultaneous"]]
    assert len(again) <= 5
    assert set(names[len(singles) :]) <= set(again)
    # the budget has no time for any other
    rest = {'STF("batch")', 'STF("all")', "strata", "2 resamples", "4 resamples"}
    assert set(found["skipped"]) >= rest | {"Taylor 0, all draws"}
    assert (folder / "audit.md").read_text().startswith("# Audit")
    assert (folder / "audit.png").stat().st_size > 10_000
    assert (folder / "recommended.yaml").exists() == bool(found["config"])
    printed = " ".join(capsys.readouterr().out.split())
    assert found["advice"] in printed
    assert "RE: variance of the current estimator" in printed
    assert "The audit needs about" in caplog.text
    for chatter in ("GPU available", "max_steps", "Trainable params", "litlogger"):
        assert chatter not in printed + caplog.text
    assert (folder / "config.yaml").exists()
    assert not (folder / "metrics.csv").exists()


def test_candidates_come_from_a_file(run, folder):
    target = {"class_path": "STF", "init_args": {"references": 8}}
    path = folder / "candidates.yaml"
    path.write_text(json.dumps([{"name": "eight", "target": target}]))
    found = json.loads((run("audit", BUDGET, f"--candidates={path}") / "audit.json").read_text())
    assert [estimator["name"] for estimator in found["estimators"]] == ["current", "eight"]
    assert found["estimators"][1]["config"]["target"]["init_args"]["references"] == 8


def test_what_is_recommended_trains_as_a_second_configuration(run, folder):
    draws = {"class_path": "CARV", "init_args": {"resamples": 2, "proposal": "LearnedProposal"}}
    path = folder / "candidates.yaml"
    path.write_text(json.dumps([{"name": "learned", "draws": draws}]))
    # present draws whose weights are 0.5 or 50: anything is better
    poor = {"class_path": "TableProposal", "init_args": {"probabilities": [0.99, 0.01]}}
    arguments = {"resamples": 1, "proposal": poor, "scope": "none"}
    own = {"class_path": "CARV", "init_args": arguments}
    base = write(folder / "base.yaml", model={"init_args": {"draws": own}})
    with counted_looks():
        audited = run("audit", "--budget=60", f"--candidates={path}", f"--config={base}")
    found = json.loads((audited / "audit.json").read_text())
    assert found["recommended"] == "learned"

    pasted = audited / "recommended.yaml"
    assert pasted.read_text() == found["config"]
    trained = run("fit", f"--config={base}", f"--config={pasted}")
    weights = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    # two steps of 256 samples, two draws of each
    table = weights["draws.proposal._extra_state"]["table"]
    assert table[2].sum() == 2 * 256 * 2
    settings = yaml.safe_load((trained / "config.yaml").read_text())["model"]["init_args"]["draws"]
    assert settings["init_args"]["scope"] == "auto"


def test_a_checkpoint_gives_the_weights_that_training_would_continue_from(run, folder, monkeypatch):
    averaging = write(
        folder / "ema.yaml",
        trainer={
            "callbacks": [
                {"class_path": "EMA"},
                {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}},
            ]
        },
    )
    path = run("fit", f"--config={averaging}") / "checkpoints/last.ckpt"
    raw = torch.load(path, weights_only=True)["current_model_state"]
    seen = {}

    def spy(module, *args, **kwargs):
        seen.update({name: value.clone() for name, value in module.state_dict().items()})
        raise SystemExit(0)

    monkeypatch.setattr(vr_trainer, "run_audit", spy)
    with pytest.raises(SystemExit):
        main(["audit", "--ckpt_path", str(path), "--data", "EightGaussians"])
    assert seen.keys() == raw.keys()
    for name, value in raw.items():
        assert torch.equal(seen[name], value), name


def test_wrong_settings_of_an_audit_are_one_line(refused, folder):
    assert "budget" in refused("audit", "--budget=0")
    assert "there is no file" in refused("audit", "--candidates=none.yaml")
    assert "there is no file" in refused("audit", "--ckpt_path=none.ckpt")
    assert "`data` must be configured" in refused("audit", data=[])
    path = folder / "candidates.yaml"
    path.write_text('[{"name": "a", "target": "Stff"}]')
    assert "Stff" in refused("audit", f"--candidates={path}")


def test_an_audit_is_listed_among_the_subcommands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "what each estimator would save" in " ".join(capsys.readouterr().out.split())
