"""How long an audit takes, and what it says meanwhile."""

import logging

import pytest
from support.networks import small_mlp

from lightning_vr import STF, Candidate, DiffusionModule, audit
from lightning_vr.data import EightGaussians

pytestmark = pytest.mark.filterwarnings("ignore:.*`max_epochs`")


def module():
    return DiffusionModule(small_mlp(width=16, std=0.1))


def data():
    return EightGaussians(batch_size=32, num_samples=512, num_validation=32)


def test_a_budget_that_does_not_suffice_is_said_to_be_so_after_the_first_repetition(caplog):
    rivals = [Candidate("all", target=STF("all"))]
    with caplog.at_level(logging.INFO):
        audit(module(), data(), rivals, budget=1, progress=False)
    (said,) = (each for each in caplog.messages if "needs about" in each)
    assert "more than its budget of 1 s: 3 repetitions of 2 estimators" in said
    caplog.clear()
    with caplog.at_level(logging.INFO):
        audit(module(), data(), rivals, budget=100, progress=False)
    assert not any("needs about" in each for each in caplog.messages)


def test_nothing_is_said_of_a_training_that_does_not_take_place(caplog, capsys, recwarn):
    with caplog.at_level(logging.INFO):
        audit(module(), data(), [], budget=100, progress=False)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    assert not recwarn


def test_the_budget_decides_how_often_is_measured():
    rivals = [Candidate("all", target=STF("all"))]
    short = audit(module(), data(), rivals, budget=20, progress=False)
    long = audit(module(), data(), rivals, budget=70, progress=False)
    assert short.repetitions >= 3
    assert long.repetitions > 2 * short.repetitions
    assert long.second_repetitions > short.second_repetitions == 4
    assert 70 <= long.seconds <= 80


def test_a_budget_that_is_too_small_still_gives_three_repetitions():
    found = audit(module(), data(), [Candidate("all", target=STF("all"))], budget=2, progress=False)
    assert (found.repetitions, found.second_repetitions) == (3, 4)
