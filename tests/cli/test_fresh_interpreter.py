"""What only a process of its own can show: light imports, and how the process ends."""

import subprocess
import sys

import pytest
from commands import NETWORK, POINTS, SHORT

CODE = """
import runpy
import sys

heavy = {"diffusers", "wandb", "matplotlib", "sklearn"}
import lightning.pytorch
# torchmetrics, which Lightning imports, imports matplotlib where it is installed
theirs = heavy & set(sys.modules)
assert theirs <= {"matplotlib"}
import lightning_vr
print("imported:", heavy & set(sys.modules) - theirs)
from lightning_vr.cli import main
try:
    main(["--help"])
except SystemExit as exit_:
    print("help:", exit_.code, heavy & set(sys.modules) - theirs)
runpy.run_module("lightning_vr", run_name="__main__")
"""


@pytest.fixture(scope="module")
def done():
    """A process that imports the package, asks for help, and runs what cannot work."""
    wrong = ["fit", *NETWORK, *POINTS, *SHORT, "--model.network.dimension=3"]
    process = [sys.executable, "-c", CODE, *wrong]
    return subprocess.run(process, capture_output=True, text=True, check=False)


def test_importing_the_package_and_asking_for_help_is_light(done):
    """Slow imports wait until they are needed."""
    assert "imported: set()" in done.stdout, done.stderr
    assert "help: 0 set()" in done.stdout, done.stderr
    assert "{fit,validate,test,predict,audit,cache,error_budget,export}" in done.stdout


def test_a_process_ends_with_the_line_and_a_status(done):
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "`network`" in line
    assert "shape of the data" in line
