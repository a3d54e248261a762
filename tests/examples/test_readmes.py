"""What README.md and the pages of the studies say can be done as they say it."""

import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch
import pytest
from diffusers import AutoencoderKL, UNet2DModel
from lightning.pytorch.loggers import CSVLogger
from support.forks import exit_code

import lightning_vr
from lightning_vr import TargetVariance
from lightning_vr.cli import main
from lightning_vr.data import Digits

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "examples").glob("*/README.md"))
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *STUDIES,
    ROOT / "tests/benchmarks/README.md",
]
FOLDERS = ("lightning_vr", "examples", "tests")
FILES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")}


def blocks(page, language):
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def command_lines(program):
    """All command lines of the pages that hold ``program``, without what stands before it."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            held = [line.split(program, 1)[1] for line in lines if program in line]
            found += [shlex.split(line, comments=True) for line in held]
    return [list(each) for each in dict.fromkeys(map(tuple, found))]


def block_with(text):
    """The Python block of README.md that holds ``text``."""
    (found,) = (block for block in blocks(ROOT / "README.md", "python") if text in block)
    return found


@pytest.fixture
def quiet_trainer(tmp_path, monkeypatch):
    """Let trainers be silent and write into a folder, and targets be measured on few samples."""
    monkeypatch.chdir(tmp_path)
    quiet = partial(
        lightning.pytorch.Trainer,
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="log"),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    monkeypatch.setattr(lightning.pytorch, "Trainer", quiet)
    few = partial(TargetVariance, noise_levels=4, samples=64)
    monkeypatch.setattr(lightning_vr, "TargetVariance", few)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_readme_has_one_command_that_installs_and_tests():
    lines = (ROOT / "README.md").read_text().splitlines()
    found = [line for line in lines if re.match("pip install .* && pytest", line)]
    assert found == ['pip install -c constraints.txt -e ".[test]" && pytest']


def test_every_study_has_a_page_that_the_readme_links_to():
    folders = {path.parent for path in (ROOT / "examples").glob("*/*.py")}
    assert {page.parent for page in STUDIES} == folders
    for page in STUDIES:
        assert f"({page.relative_to(ROOT)})" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for path in re.findall(r"\b(?:configs|examples|tests|lightning_vr)/[\w./]*\.\w+", text):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path
    for name in re.findall(r"`(\w+\.py)`", text):
        assert name in FILES, name


@pytest.mark.parametrize("page", STUDIES, ids=lambda page: page.parent.name)
def test_a_page_names_all_scripts_and_pictures_of_its_study(page):
    for path in page.parent.iterdir():
        if path.suffix in (".py", ".png"):
            assert path.name in page.read_text(), path


@pytest.mark.parametrize("arguments", command_lines("-m lightning_vr "), ids=" ".join)
def test_a_command_line_of_the_pages_is_understood(arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    given = ["configs/eight_gaussians.yaml" if each == "job.yaml" else each for each in arguments]
    flag = "--print_config"
    with pytest.raises(SystemExit) as exit_:
        main(given if flag in given else [*given, flag])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert re.search(r"class_path: (lightning_vr\.DiffusionModule|examples\.\w+)", printed)


@pytest.mark.parametrize("arguments", command_lines("python examples/"), ids=" ".join)
def test_a_script_has_the_options_that_the_pages_give_it(arguments):
    script, *options = arguments
    text = (ROOT / "examples" / script).read_text()
    for option in options:
        if option.startswith("--"):
            assert f'add_argument("{option}"' in text


@pytest.mark.usefixtures("no_pictures")
def test_the_subclass_of_the_readme_trains_and_samples(quiet_trainer):
    code = block_with("class Latents").replace("4096", "64").replace("100_000", "2")
    vae = AutoencoderKL(1, 1, block_out_channels=[4], norm_num_groups=4, latent_channels=2)
    shape = {"in_channels": 2, "out_channels": 2, "sample_size": 8}
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    network = UNet2DModel(
        **shape, **blocks, block_out_channels=[8], norm_num_groups=8, layers_per_block=1
    )
    names = {"vae": vae, "network": network, "datamodule": Digits()}
    exec(code, names)
    assert names["latents"].shape == (64, 2, 8, 8)


@pytest.mark.usefixtures("no_pictures")
def test_the_callbacks_of_the_readme_attach_to_another_module(quiet_trainer, tmp_path):
    code = block_with("watch_targets").replace("max_steps=1000", "max_steps=11")
    example = runpy.run_path(str(ROOT / "examples/attach_to_a_trainer.py"))
    exec(code, {"module": example["Denoiser"](), "datamodule": Digits()})
    for name in ("target_variance.csv", "gradient_variance.csv"):
        assert (tmp_path / "log/version_0" / name).stat().st_size > 0


def test_the_loop_of_the_readme_needs_no_lightning():
    shown = "\nassert samples.shape == (16, 2)\nassert samples.isfinite().all()\n"
    loop = block_with("Diffusion(ResidualMLP()").replace("range(1000)", "range(20)")

    def run():
        # a fork, as a new interpreter would import torch again
        for name in list(sys.modules):
            if name.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_vr"):
                del sys.modules[name]
        sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
        exec(loop + shown, {})

    assert exit_code(run, 300) == 0


@pytest.mark.parametrize("page", STUDIES, ids=lambda page: page.parent.name)
def test_the_code_of_a_study_builds_a_module(page):
    names = {name: getattr(lightning_vr, name) for name in lightning_vr.__all__}
    for block in blocks(page, "python"):
        exec(block, names | {"network": lightning_vr.ResidualMLP()})
