"""Command lines run in this process, in an empty folder."""

from functools import partial

import pytest
from commands import run_in


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The empty folder that the command line runs in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder):
    """Run a subcommand on points with a small network; return the new run's folder."""
    return partial(run_in, folder)


@pytest.fixture
def refused(run, capsys):
    """Return the one line on stderr with which a subcommand is refused."""

    def go(*args, **kwargs):
        with pytest.raises(SystemExit) as exit_:
            run(*args, **kwargs)
        assert exit_.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:]
        return errors[0]

    return go
