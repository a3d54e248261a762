"""How many processes a trainer may start, and how those of several nodes find each other."""

import os

import pytest

from lightning_vr.cli.vr_cli import VRCLI

PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "NODE_RANK": "0"}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No cluster's environment, whatever other tests have left."""
    for name in (*PLACE, "GROUP_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def trainer(**settings):
    """The trainer that the command line would start."""
    model = {"network": {"class_path": "ResidualMLP"}}
    return VRCLI(
        args={
            "model": {"class_path": "DiffusionModule", "init_args": model},
            "data": {"class_path": "EightGaussians"},
            "trainer": {"accelerator": "cpu", "max_steps": 5, **settings},
        },
        run=False,
    ).trainer


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ([], "MASTER_ADDR and MASTER_PORT and NODE_RANK"),
        (["NODE_RANK"], "without MASTER_PORT:"),
        (["MASTER_PORT", "MASTER_ADDR"], "without NODE_RANK"),
    ],
    ids=str,
)
def test_a_run_that_would_wait_for_other_nodes_for_ever_is_refused(given, missing, monkeypatch):
    for name in given:
        monkeypatch.setenv(name, PLACE[name])
    with pytest.raises(ValueError, match=r"`trainer\.num_nodes` must be 1 .* got 2") as error:
        trainer(num_nodes=2)
    assert missing in str(error.value)


@pytest.mark.parametrize("left_out", [None, "MASTER_ADDR"])
def test_nodes_that_their_environment_brings_together_are_taken(left_out, monkeypatch):
    for name, value in PLACE.items():
        if name != left_out:  # the first node is itself where the others come to
            monkeypatch.setenv(name, value)
    assert trainer(num_nodes=2).world_size == 2


def test_more_processes_than_the_cores_could_run_are_refused(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert trainer(devices=8).world_size == 8
    with pytest.raises(ValueError, match=r"`trainer\.devices` must be at most 8 .* got 9: use 2"):
        trainer(devices=9)
