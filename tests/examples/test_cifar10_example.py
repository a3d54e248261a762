"""The scripts of the CIFAR-10 study, on images that are made here."""

import io
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support.networks import small_unet

from lightning_vr import Clean, DiffusionModule
from lightning_vr.core.types import WHOLE_STEP
from lightning_vr.metrics import ClassifierFeatures

EXAMPLE = Path(__file__).parents[2] / "examples/cifar10"
CLASSES = ["cat", "dog"]


def run(script, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLE / script), run_name="__main__")


def test_the_binary_archive_becomes_images_by_class(tmp_path, monkeypatch):
    batch = np.zeros((3, 3073), dtype=np.uint8)
    batch[:, 0] = [1, 0, 1]
    batch[1, 1 + 2] = 10  # red of the third pixel of the first row
    batch[1, 1 + 1024 + 32] = 20  # green of the first pixel of the second row
    files = {"batches.meta.txt": "\n".join(CLASSES).encode()}
    names = ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")
    files |= dict.fromkeys(names, batch.tobytes())
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    run("unpack.py", tmp_path / "cifar.tar.gz", tmp_path / "images", monkeypatch=monkeypatch)

    found = {str(path.relative_to(tmp_path / "images")) for path in tmp_path.rglob("*.png")}
    assert found == {
        *(f"train/dog/{i:05d}.png" for i in (0, 2, 3, 5)),
        *(f"train/cat/{i:05d}.png" for i in (1, 4)),
        *(f"test/dog/{i:05d}.png" for i in (0, 2)),
        "test/cat/00001.png",
    }
    image = Image.open(tmp_path / "images/train/cat/00001.png")
    assert image.getpixel((2, 0)) == (10, 0, 0)
    assert image.getpixel((0, 1)) == (0, 20, 0)


def test_the_classifier_learns_to_tell_dark_from_bright(tmp_path, monkeypatch, capsys):
    noise = np.random.default_rng(0)
    for name, level in zip(CLASSES, (50, 200), strict=True):
        (tmp_path / name).mkdir()
        for i in range(90):
            pixels = noise.integers(level - 40, level + 40, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")

    output = tmp_path / "classifier.pt"
    flags = ["--size", 8, "--epochs", 40]
    with torch.random.fork_rng():
        run("train_classifier.py", tmp_path, output, *flags, monkeypatch=monkeypatch)
    assert "100.0% of 18 held-out images are classified right" in capsys.readouterr().out
    assert ClassifierFeatures(output)(torch.zeros(2, 3, 8, 8)).shape == (2, 128)


def test_a_step_of_fit_is_timed_against_a_bare_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = EXAMPLE.parents[1] / "configs/digits_dsm.yaml"
    tiny = ["--model.network.init_args.block_out_channels=[8,8]", "--data.batch_size=4"]
    flags = ["--segments", 3, "--steps", 1, "--targets", "DSM", "STF(all)", *tiny]
    run("measure_steps.py", config, *flags, monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].split(", ")[1] for line in lines] == ["DSM", "STF(all)"]
    assert all("ratio" in line for line in lines)


def test_the_bare_loop_has_the_loss_of_the_module():
    names = runpy.run_path(str(EXAMPLE / "measure_steps.py"))
    module = DiffusionModule(small_unet(), sigma_data=0.7)
    source = torch.Generator().manual_seed(0)
    clean = Clean(torch.randn(6, 1, 8, 8, generator=source))
    times = module.draws.times(clean, module.objective, source, WHOLE_STEP)
    noised, target = module.draw(clean, source, times)

    expected = module.compute_loss(noised, target).loss
    found = names["plain_loss"](module.network, clean.x0, noised.t, noised.noise, 0.7, {})
    torch.testing.assert_close(found, expected)
