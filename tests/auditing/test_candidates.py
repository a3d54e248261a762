"""Which estimators are compared: those that ship, or those of a file."""

import pytest
import torch
from jsonargparse import ArgumentError
from torch.utils.data import DataLoader

from lightning_vr.auditing import Candidate, audit
from lightning_vr.auditing.candidates import check_candidates, read_candidates
from lightning_vr.auditing.default_candidates import default_candidates
from lightning_vr.data import EightGaussians
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import IID
from lightning_vr.estimators.proposals import WeightProposal
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.process.beta_density import Beta
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.schedules import VP
from lightning_vr.process.weightings import EDMWeighting, MinSNRWeighting, P2Weighting
from lightning_vr.training.module import DiffusionModule

FEW = ["STF(1024)", "strata, q learned", "pairs"]
REST = ['STF("batch")', "STF(256)", 'STF("all")', "strata", "2 resamples"]
REST += ["Taylor 0, all draws", "Taylor 0", "4 resamples"]
DRAWS = ["strata", "strata, q learned", "pairs", "2 resamples", "4 resamples"]


def candidates(size=2000, **settings):
    return {c.name: c for c in default_candidates(DiffusionModule(ResidualMLP(), **settings), size)}


def names(size=2000, **settings):
    return list(candidates(size, **settings))


def test_the_estimators_that_ship_are_compared_the_most_promising_first():
    assert names() == [*FEW, *REST]
    assert "STF(256)" in names(target=STF(256, min_noise_level=0.5))


def test_draws_are_compared_with_the_stf_that_the_module_has():
    others = [name for name in REST if name != "STF(256)"]
    assert names(target=STF(256)) == ["DSM", *FEW, *others]
    found = candidates(target=STF(256))
    assert all(set(found[name].slots()) == {"draws"} for name in DRAWS)


def test_independent_draws_are_compared_where_the_module_has_others():
    found = candidates(draws=CARV(2))
    others = [name for name in REST if name != "2 resamples"]
    assert list(found) == ["IID", *FEW, *others]
    assert set(found["STF(256)"].slots()) == {"target"}
    assert isinstance(found["IID"].draws, IID)
    assert "2 resamples" in names(draws=CARV(2, WeightProposal()))


def test_the_weight_is_a_proposal_only_where_it_depends_on_t():
    assert "strata, q = weight" not in names(schedule=VP(), prediction="epsilon")
    assert "strata, q = weight" not in names(weighting=EDMWeighting())
    found = candidates(weighting=MinSNRWeighting())
    assert isinstance(found["strata, q = weight"].draws.proposal, WeightProposal)


def test_a_control_variate_is_compared_with_none():
    found = candidates(control_variate=TaylorCV())
    own = [name for name in found if "Taylor" in name or "control" in name]
    assert own == ["no control variate", "Taylor 0, all draws"]
    module = DiffusionModule(ResidualMLP(), control_variate=TaylorCV())
    with found["no control variate"].in_place(module):
        assert module.control_variate is None
    assert isinstance(module.control_variate, TaylorCV)
    assert found["no control variate"].config() == {"control_variate": None}


def test_no_candidate_has_more_references_than_there_are_samples():
    found = names(size=200)
    assert [name for name in found if "STF" in name] == ['STF("batch")', 'STF("all")']


def test_a_large_training_set_is_not_encoded_unasked(caplog):
    with caplog.at_level("INFO"):
        found = names(size=1_000_000)
    assert [name for name in found if "STF" in name] == ['STF("batch")']
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
        ("name: few", r"`candidates` must be a file with a list, got .*candidates.yaml with "),
        ("", r"`candidates` must be a file with a list, got .*candidates.yaml with "),
    ],
)
def test_a_file_that_holds_no_list_is_refused(tmp_path, text, message):
    path = tmp_path / "candidates.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_candidates(path)


def test_a_file_that_is_missing_or_wrong_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"`candidates` must be a YAML file, got .*none.yaml, but there is no file"
    ):
        read_candidates(tmp_path / "none.yaml")
    path = tmp_path / "candidates.yaml"
    path.write_text("- name: few\n  target: {class_path: STF, init_args: {reference: 16}}\n")
    with pytest.raises(ArgumentError, match="reference"):
        read_candidates(path)


def test_names_must_tell_candidates_apart():
    for twice in (["a", "a"], ["current"]):
        with pytest.raises(ValueError, match="`candidates` must have different names"):
            check_candidates([Candidate(name, target=DSM()) for name in twice])
    with pytest.raises(ValueError, match="'empty' fills no slot"):
        check_candidates([Candidate("empty")])


def test_a_candidate_is_in_the_slots_for_a_while_only():
    module = DiffusionModule(ResidualMLP())
    own, other = module.target, STF(16)
    with Candidate("a", target=other).in_place(module):
        assert module.target is other
    assert module.target is own


def test_what_changes_the_objective_is_no_candidate(tmp_path):
    path = tmp_path / "candidates.yaml"
    for name in ("timesteps", "weighting", "prediction"):
        path.write_text(f"- name: other\n  {name}: Beta\n")
        with pytest.raises(ValueError, match=f"Candidate 'other' must .* got `{name}`, which chan"):
            read_candidates(path)
    with pytest.raises(ValueError, match=r"got `draws`, which changes it.* held-out plain loss"):
        Candidate("other", draws=Beta(2, 1))
    with pytest.raises(ValueError, match="got `target`, which changes it"):
        Candidate("other", target=P2Weighting())


def test_a_name_is_no_candidate_and_a_loader_no_data_module():
    module = DiffusionModule(ResidualMLP(2, width=8))
    with pytest.raises(ValueError, match=r"`candidates` must be .*Candidate, got 'STF': use Cand"):
        audit(module, EightGaussians(), ["STF"])
    with pytest.raises(ValueError, match=r"`datamodule` must be .*, got a DataLoader: use Light"):
        audit(module, DataLoader(torch.zeros(4, 2)))
