"""Which estimators are compared: those that ship, or those of a file."""

import pytest
from jsonargparse import ArgumentError

from lightning_vr.auditing import Candidate
from lightning_vr.auditing.candidates import check_candidates, default_candidates, read_candidates
from lightning_vr.estimators.dsm import DSM
from lightning_vr.estimators.stf import STF
from lightning_vr.module import DiffusionModule
from lightning_vr.networks import MLP


def names(target, size=2000):
    return [c.name for c in default_candidates(DiffusionModule(MLP(), target=target), size)]


def test_the_estimators_that_ship_are_compared_less_the_current_one():
    others = ['STF("batch")', "STF(256)", "STF(1024)", 'STF("all")']
    assert names(DSM()) == others
    assert names(STF(256)) == ["DSM", *(name for name in others if name != "STF(256)")]
    assert names(STF("all")) == ["DSM", *others[:-1]]
    assert "STF(256)" in names(STF(256, min_noise_level=0.5))


def test_no_candidate_has_more_references_than_there_are_samples():
    assert names(DSM(), size=200) == ['STF("batch")', 'STF("all")']


def test_a_large_training_set_is_not_encoded_unasked(caplog):
    with caplog.at_level("INFO"):
        assert names(DSM(), size=1_000_000) == ['STF("batch")']
    assert "all 1000000 training samples" in caplog.text


def test_a_file_names_candidates_and_their_slots(tmp_path):
    path = tmp_path / "candidates.yaml"
    path.write_text(
        "- name: few\n  target: {class_path: STF, init_args: {references: 16}}\n"
        "- name: plain\n  draws: IID\n  target: DSM\n"
    )
    few, plain = read_candidates(path)
    assert few.name == "few"
    assert isinstance(few.target, STF)
    assert few.target.references == 16
    assert set(few.slots()) == {"target"}
    assert set(plain.slots()) == {"draws", "target"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: few", "expected to be a file with a list"),
        ("", "expected to be a file with a list"),
    ],
)
def test_a_file_that_holds_no_list_is_refused(tmp_path, text, message):
    path = tmp_path / "candidates.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_candidates(path)


def test_a_file_that_is_missing_or_wrong_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_candidates(tmp_path / "none.yaml")
    path = tmp_path / "candidates.yaml"
    path.write_text("- name: few\n  target: {class_path: STF, init_args: {reference: 16}}\n")
    with pytest.raises(ArgumentError, match="reference"):
        read_candidates(path)


def test_names_must_tell_candidates_apart():
    for twice in (["a", "a"], ["current"]):
        with pytest.raises(ValueError, match="different names"):
            check_candidates([Candidate(name, target=DSM()) for name in twice])
    with pytest.raises(ValueError, match="'empty' fills no slot"):
        check_candidates([Candidate("empty")])


def test_a_candidate_is_in_the_slots_for_a_while_only():
    module = DiffusionModule(MLP())
    own, other = module.target, STF(16)
    with Candidate("a", target=other).in_place(module):
        assert module.target is other
    assert module.target is own
