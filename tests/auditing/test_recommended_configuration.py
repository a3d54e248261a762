"""The lines that select what an audit recommends, as a second configuration."""

import pytest
import yaml
from support.audits import an_audit, measured

from lightning_vr.auditing import report, save_report
from lightning_vr.auditing.report import RECOMMENDED
from lightning_vr.cli.vr_cli import VRCLI
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.proposals import LearnedProposal, TableProposal
from lightning_vr.estimators.stf import STF
from lightning_vr.lifecycle.configuration import describe


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


def test_a_second_configuration_is_written_with_a_recommendation_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    config = {"target": describe(STF(64))}
    save_report(an_audit(measured("STF(64)", 2.0, config=config)), tmp_path)
    assert parsed(tmp_path, BASE, (tmp_path / RECOMMENDED).read_text()).target.references == 64
    save_report(an_audit(measured("STF(64)", 0.9, config=config)), tmp_path)
    assert not (tmp_path / RECOMMENDED).exists()
    save_report(an_audit(measured("STF(64)", 0.9, config=config)), tmp_path)
