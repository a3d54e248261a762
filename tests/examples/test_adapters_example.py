"""The study of adapters runs as a reader runs it, in steps that are few."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.utils import dynamic_modules_utils

from lightning_vr import Candidate
from lightning_vr.cli import main
from lightning_vr.estimators.carv import CARV

pytest.importorskip("peft", reason="needs the extra 'adapters'")

STUDY = Path(__file__).parents[2] / "examples/adapters"
QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=4",
    "--trainer.limit_val_batches=1",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]

pytestmark = pytest.mark.filterwarnings("ignore:GradientVariance has measured nothing")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the network of the known digits at ``runs/adapters/base``."""
    top = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDY)
        study = runpy.run_path(str(STUDY / "adapt_digits.py"))
    study["train_base"](top / "runs/adapters/base", 6)
    return top


@pytest.fixture
def here(base, monkeypatch):
    """Run scripts and commands in the folder of the study."""
    monkeypatch.syspath_prepend(STUDY)
    monkeypatch.chdir(base)
    return base


def run(name, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(STUDY / name), run_name="__main__")


@pytest.mark.parametrize(
    ("options", "falls_to"),
    [
        (["--steps", "4", "--batch_size", "16"], None),  # no loss falls in so few
        pytest.param(["--folder", "whole"], 0.85, marks=pytest.mark.slow),
    ],
)
def test_few_parameters_train_the_loss_falls_and_diffusers_samples_the_same(
    here, monkeypatch, capsys, tmp_path, options, falls_to
):
    def in_this_process(command, check):
        code = command[2].replace('sys.modules["lightning_vr"] = None', "")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[2:])
            exec(code, {})

    # tests/pipelines has the process that cannot import the package: starting one takes seconds
    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "code"))
    run("adapt_digits.py", options, monkeypatch)
    printed = capsys.readouterr().out
    share = float(re.search(r"parameters train, ([\d.]+)%", printed)[1])
    losses = re.search(r"new digits: (\S+) before, (\S+) after", printed)
    before, after = map(float, losses.groups())
    assert 0 < share < 5
    assert after != before
    assert falls_to is None or after < falls_to * before
    assert float(printed.split()[-1]) < 1e-4
    folder = "whole" if falls_to else "runs/adapters"
    assert (here / folder / "samples.png").stat().st_size > 1000


@pytest.mark.slow
def test_estimators_are_audited_and_trained_for_the_same_compute(here, monkeypatch, capsys):
    monkeypatch.setattr(
        "lightning_vr.auditing.default_candidates.default_candidates",
        lambda module, size: [Candidate("strata", draws=CARV(1)), Candidate("pair", CARV(2))],
    )
    sizes = ["--batch_sizes", "1", "--trained", "1", "--steps", "3", "--seeds", "2"]
    run("audit_adapters.py", [*sizes, "--budget", "0.1", "--timed_steps", "2"], monkeypatch)
    audits, trained = (
        json.loads((here / f"runs/adapters/{name}.json").read_text())["1"]
        for name in ("audits", "trained")
    )
    arms = audits["arms"]
    assert {arms["best"]["name"], arms["rejected"]["name"]} == {"strata", "pair"}
    for row in trained.values():
        assert row["steps"] == max(1, round(3 * trained["plain"]["seconds"] / row["seconds"]))
        assert len(row["losses"]) == 2
    printed = capsys.readouterr().out
    assert "batch 1, current: 3 steps" in printed
    assert "from plain +0.0000 ± 0.0000" in printed


@pytest.fixture
def killed(monkeypatch):
    """Let a signal end a run in its third batch, if the environment says so."""
    from examples.adapters.named_digits import NamedDigits

    def step(self, batch, batch_idx):
        if self.global_step == 2 and os.environ.pop("KILL", None):
            os.kill(os.getpid(), signal.SIGTERM)
        return super(NamedDigits, self).training_step(batch, batch_idx)

    monkeypatch.setattr(NamedDigits, "training_step", step, raising=False)


def last(here, run):
    path = here / f"runs/digits_lora/version_{run}/checkpoints/last.ckpt"
    return torch.load(path, weights_only=True), path


def test_the_configuration_fits_a_folder_and_a_killed_run_goes_on_bitwise(
    here, killed, monkeypatch
):
    fit = ["fit", f"--config={STUDY / 'digits_lora.yaml'}", *QUICK]
    main(fit)
    monkeypatch.setenv("KILL", "yes")
    with pytest.raises(SystemExit):
        main(fit)
    assert last(here, 1)[0]["global_step"] < 4
    main([*fit, "--ckpt_path=last"])

    (whole, _), (resumed, path) = last(here, 0), last(here, 2)
    for weights in ("state_dict", "current_model_state"):
        assert all(".lora_" in name for name in whole[weights] if name.startswith("network."))
        assert resumed[weights].keys() == whole[weights].keys()
        assert all(torch.equal(x, whole[weights][name]) for name, x in resumed[weights].items())

    config = f"--config={STUDY / 'digits_lora.yaml'}"
    main(["export", config, f"--ckpt_path={path}", "--format=lora", "--output=lora_of_cli"])
    assert (here / "lora_of_cli/pytorch_lora_weights.safetensors").is_file()
