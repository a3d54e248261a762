"""Each command on each kind of damaged or hostile checkpoint: one line, status 2, nothing run."""

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import small_mlp
from support.trainers import quiet_trainer

from lightning_vr import DiffusionModule
from lightning_vr.cli import main
from lightning_vr.data import EightGaussians

ALL = ("predict", "fit", "audit", "load_from_checkpoint")
COMMANDS = ("predict", "fit", "audit")
FIT = ("fit",)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The file of a run of two steps, with an optimizer that has moments."""
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    module = DiffusionModule(small_mlp())
    trainer.fit(module, EightGaussians(batch_size=16, num_samples=64, num_validation=16))
    trainer.save_checkpoint(path, weights_only=False)
    return path


def content(good):
    return torch.load(good, weights_only=True)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def part(start, stop):
    """Some part of the file, as fractions of its length."""

    def cut(good):
        whole = good.read_bytes()
        return whole[int(start * len(whole)) : int(stop * len(whole))]

    return cut


def without(*names):
    def leave_out(good):
        checkpoint = content(good)
        for name in names:
            del checkpoint[name]
        return saved(checkpoint)

    return leave_out


def without_own(name):
    return changing(lambda checkpoint: checkpoint["lightning_vr"].pop(name))


def having(**entries):
    """Replace entries; ``a__b`` stands for b in a."""

    def replace(good):
        checkpoint = content(good)
        for name, value in entries.items():
            *outer, last = name.split("__")
            at = checkpoint
            for key in outer:
                at = at[int(key) if key.isdigit() else key]
            at[int(last) if last.isdigit() else last] = value
        return saved(checkpoint)

    return replace


def changing(change):
    def replace(good):
        checkpoint = content(good)
        change(checkpoint)
        return saved(checkpoint)

    return replace


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), text)
    return buffer.getvalue()


def picture(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    return buffer.getvalue()


def arrays(*_):
    buffer = io.BytesIO()
    np.savez(buffer, samples=np.zeros(3))
    return buffer.getvalue()


def safetensors(*_):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


def flipped(good):
    whole = bytearray(good.read_bytes())
    at = whole.index(b"state_dict")
    whole[at - 3 : at + 3] = b"\xff" * 6
    return bytes(whole)


def first_weight(value):
    def change(checkpoint):
        weights = checkpoint["state_dict"]
        name = next(iter(weights))
        weights[name] = value(weights[name]) if callable(value) else value

    return changing(change)


def moments(**entries):
    return changing(
        lambda checkpoint: checkpoint["optimizer_states"][0]["state"][0].update(entries)
    )


def hyper(**entries):
    return changing(lambda checkpoint: checkpoint["hyper_parameters"].update(entries))


NAN = float("nan")
OTHER = {"_class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
WIDER = {"class_path": "lightning_vr.ResidualMLP", "init_args": {"width": 4, "depth": 1}}
HUGE = {"class_path": "lightning_vr.ResidualMLP", "init_args": {"width": 10**7, "depth": 1}}
NEGATIVE = {"class_path": "lightning_vr.ResidualMLP", "init_args": {"width": -4}}
DAMAGED = {
    # files
    "empty": (lambda good: b"", ALL, "an empty file"),
    "zero bytes": (lambda good: bytes(9000), ALL, "a file of zero bytes"),
    "cut at 1 %": (part(0, 0.01), ALL, "cut off after"),
    "cut at half": (part(0, 0.5), ALL, "cut off after"),
    "cut at 99 %": (part(0, 0.99), ALL, "cut off after"),
    "the second half": (part(0.5, 1), ALL, "loads safely"),
    "another byte": (flipped, ALL, "damaged|must be"),
    "text": (lambda good: b"some words\n", ALL, "a text file"),
    "random bytes": (lambda good: bytes(range(255, 0, -1)) * 40, ALL, "is damaged"),
    "an image": (lambda good: picture("png"), ALL, "a PNG image"),
    "a photograph": (lambda good: picture("jpeg"), ALL, "a JPEG image"),
    "a zip": (lambda good: zipped(a_txt="words"), ALL, "zip archive that torch has not written"),
    "a script archive": (lambda good: zipped(a__constants_pkl="", a__data_pkl=""), ALL, "Script"),
    "arrays": (arrays, ALL, "a NumPy archive"),
    "safetensors": (safetensors, ALL, "a safetensors file, which holds weights alone"),
    "a pointer of git": (lambda good: b"version https://git-lfs.github.com/spec/v1\n", ALL, "lfs"),
    "a pickle": (lambda good: b"\x80\x04K\x05.", ALL, "loads safely"),
    # what it holds
    "a tensor": (lambda good: saved(torch.zeros(3)), ALL, "holds a Tensor"),
    "a list": (lambda good: saved([1, 2]), ALL, "holds a list"),
    "nothing": (lambda good: saved(None), ALL, "holds a NoneType"),
    "no entries": (lambda good: saved({}), ALL, "has no `state_dict`"),
    "weights alone": (lambda good: saved(content(good)["state_dict"]), ALL, "weights alone"),
    "no state_dict": (without("state_dict"), ALL, "has no `state_dict`"),
    "state_dict none": (having(state_dict=None), ALL, "`state_dict` .* got nothing"),
    "state_dict list": (having(state_dict=[1]), ALL, "`state_dict` .* got a list"),
    "state_dict by number": (having(state_dict={1: torch.zeros(1)}), ALL, "weights by name"),
    "no weights": (having(state_dict={}), ALL, "does not fit the module"),
    "one weight less": (
        changing(lambda x: x["state_dict"].popitem()),
        ALL,
        r"does not fit the module: .*\(none\) there",
    ),
    "one weight more": (
        changing(lambda x: x["state_dict"].update(extra=torch.zeros(1))),
        ALL,
        r"`extra` has shape \(1,\) there and \(none\)",
    ),
    "a weight of text": (first_weight("words"), ALL, "must be a dense tensor, got 'words'"),
    "a weight of another shape": (first_weight(torch.zeros(3, 3, 3)), ALL, r"shape \(3, 3, 3\)"),
    "a weight on meta": (first_weight(lambda x: x.to("meta")), ALL, "a meta tensor"),
    "a sparse weight": (first_weight(lambda x: torch.zeros(3, 3).to_sparse()), ALL, "a sparse"),
    "a complex weight": (
        first_weight(lambda x: x.to(torch.complex64)),
        ALL,
        "of complex",
    ),
    "a whole number for a weight": (
        first_weight(lambda x: x.to(torch.int64)),
        ALL,
        "of whole",
    ),
    "averages none": (having(current_model_state=None), ALL, "`current_model_state`"),
    "averages of another shape": (
        having(current_model_state={"network.project_in.weight": torch.zeros(1)}),
        ("audit",),
        "does not fit the module",
    ),
    # what rebuilds it
    "hyper_parameters a list": (having(hyper_parameters=[1]), ALL, "settings by name, got a list"),
    "hyper_parameters none": (having(hyper_parameters=None), ALL, "settings by name, got nothing"),
    "hyper_parameters by number": (having(hyper_parameters={1: 2}), ALL, "settings by name"),
    "no hyper_parameters": (without("hyper_parameters"), ALL, "model|rebuild"),
    "no network": (changing(lambda x: x["hyper_parameters"].pop("network")), ALL, "network"),
    "another setting": (hyper(nonesuch=3), ALL, "nonesuch"),
    "a wrong setting": (hyper(prediction="nonesuch"), ALL, "prediction"),
    "a setting that is no number": (hyper(sigma_data="wide"), ALL, "sigma_data"),
    "a network of no arguments": (hyper(network="ResidualMLPs"), ALL, "network"),
    "a network of negative size": (hyper(network=NEGATIVE), ALL, "negative|width"),
    "a tensor for a setting": (hyper(lr_scheduler=torch.zeros(2, 3)), ALL, "`lr_scheduler`"),
    "numbers for arguments": (hyper(network={1: 2}), ALL, "`network` .* with the key 1"),
    "a class of no name": (hyper(_class_path={1: 2}), ALL, "_class_path` .* the name of a class"),
    "another class": (hyper(**OTHER), ALL, r"holds a lightning.*no subclass of \w+Module"),
    "another network": (hyper(network=WIDER), ALL, "does not fit the module"),
    "a network of terabytes": (hyper(network=HUGE), ALL, r"does not fit .* \(10000000, 2\) as"),
    # the package's own state
    "own state a list": (having(lightning_vr=[]), ALL, "`lightning_vr` .* got a list"),
    "seed of text": (having(lightning_vr__seed="one"), ALL, "lightning_vr.seed` .* got 'one'"),
    "seed below 0": (having(lightning_vr__seed=-1), ALL, "lightning_vr.seed` .* got -1"),
    "shape of NaN": (having(lightning_vr__sample_shape=[NAN]), ALL, "sizes of 1 or more"),
    "shape below 0": (having(lightning_vr__sample_shape=[-2]), ALL, "sizes of 1 or more"),
    "shape of text": (having(lightning_vr__sample_shape="2"), ALL, "sample_shape"),
    "rows of text": (having(lightning_vr__csv_rows={"a": "b"}), FIT, "csv_rows"),
    "objects of numbers": (
        having(lightning_vr__objects=[1]),
        ALL,
        "objects` .* must be text, got 1",
    ),
    "skipped of text": (having(lightning_vr__skipped="one"), ALL, "skipped"),
    # Lightning's state
    "no version": (without("pytorch-lightning_version"), COMMANDS, "must be a version, got noth"),
    "a wrong version": (
        changing(lambda x: x.update({"pytorch-lightning_version": "new"})),
        COMMANDS,
        "must be a version, got 'new'",
    ),
    "weights only": (
        without("optimizer_states", "callbacks", "lr_schedulers"),
        FIT,
        "with the state of training",
    ),
    "no loops": (without("loops"), FIT, "`loops`"),
    "loops none": (having(loops=None), FIT, "`loops`"),
    "no loop of fits": (changing(lambda x: x["loops"].pop("fit_loop")), FIT, "loops.fit_loop"),
    "no progress": (
        changing(lambda x: x["loops"]["fit_loop"].pop("epoch_loop.batch_progress")),
        FIT,
        "epoch_loop.batch_progress",
    ),
    "progress of text": (
        having(loops__fit_loop__epoch_progress__current__ready="one"),
        FIT,
        "epoch_progress.current.ready",
    ),
    "progress below 0": (
        having(loops__fit_loop__epoch_progress__current__ready=-1),
        FIT,
        "epoch_progress.current.ready",
    ),
    "no callbacks": (without("callbacks"), FIT, "`callbacks`"),
    "callbacks a list": (having(callbacks=[]), FIT, "`callbacks`"),
    "no optimizers": (without("optimizer_states"), FIT, "`optimizer_states`"),
    "optimizers none": (having(optimizer_states=None), FIT, "`optimizer_states`"),
    "optimizers empty": (having(optimizer_states=[]), FIT, "must be 1 states .* got 0"),
    "optimizers twice": (
        changing(lambda x: x["optimizer_states"].extend(x["optimizer_states"])),
        FIT,
        "must be 1 states .* got 2",
    ),
    "optimizer of text": (having(optimizer_states=["one"]), FIT, "`optimizer_states`"),
    "optimizer without groups": (having(optimizer_states=[{"state": {}}]), FIT, "states of param"),
    "optimizer of fewer parameters": (
        changing(lambda x: x["optimizer_states"][0]["param_groups"][0]["params"].pop()),
        FIT,
        "of .* parameters",
    ),
    "another optimizer": (
        changing(lambda x: x["optimizer_states"][0]["param_groups"][0].pop("betas")),
        FIT,
        "optimizer_states.betas",
    ),
    "an option of no number": (
        having(optimizer_states__0__param_groups__0__eps=[None]),
        FIT,
        r"optimizer_states.eps` .* must be as 1e-08 is",
    ),
    "a rate of NaN": (
        having(optimizer_states__0__param_groups__0__lr=NAN),
        FIT,
        "optimizer_states.lr` .* got nan",
    ),
    "no seed": (having(lightning_vr__seed=None), FIT, "lightning_vr.seed` .* got nothing"),
    "no position": (without_own("position"), FIT, "lightning_vr.position` .* got nothing"),
    "position of few fields": (
        having(lightning_vr__position={}),
        ALL,
        "lightning_vr.position.epoch",
    ),
    "due of text": (
        having(lightning_vr__position__due="words"),
        ALL,
        "due` .* one of nothing, bat",
    ),
    "batches of no number": (
        having(lightning_vr__position__batches=1e300),
        ALL,
        r"position.batches` .* got 1e\+300",
    ),
    "hooks of text": (having(lightning_vr__position__left="words"), ALL, "names of hooks"),
    "window of few fields": (having(lightning_vr__window={}), ALL, "lightning_vr.window.batches"),
    "row of few fields": (having(lightning_vr__row={}), ALL, "lightning_vr.row.step"),
    "metrics of text": (having(lightning_vr__metrics={"a": "b"}), ALL, "metrics.a` .* a tensor"),
    "sums of no number": (
        having(lightning_vr__sums={"a": {"name": "a", "value": 1e300}}),
        ALL,
        "sums.a",
    ),
    "calls of nothing": (having(lightning_vr__sample_calls=None), ALL, "sample_calls` .* got noth"),
    "sigma_data below 0": (having(lightning_vr__sigma_data=-1), ALL, "positive and finite, got -1"),
    "gradients of another module": (
        having(lightning_vr__window={"batches": 1, "lost": 0, "gradients": {"a": torch.ones(1)}}),
        FIT,
        "window.gradients.a` .* the gradient of a parameter",
    ),
    "order of data by no seed": (having(EightGaussians__seed=None), FIT, "`seed` .* got None"),
    "a rate of no number": (
        having(optimizer_states__0__param_groups__0__lr=1e300),
        FIT,
        r"optimizer_states.lr` .* got 1e\+300",
    ),
    "position of text": (having(lightning_vr__position="one"), ALL, "lightning_vr.position`"),
    "calls of text": (having(lightning_vr__sample_calls="one"), ALL, "sample_calls`"),
    "a parameter of no number": (
        having(optimizer_states__0__param_groups__0__params__1=NAN),
        FIT,
        "`optimizer_states",
    ),
    "moments of another shape": (moments(exp_avg=torch.zeros(2, 7)), FIT, r"got \(2, 7\)"),
    "moments of text": (moments(exp_avg="one"), FIT, "exp_avg"),
    "schedulers none": (having(lr_schedulers=None), FIT, "`lr_schedulers`"),
    "schedulers twice": (having(lr_schedulers=[{}, {}]), FIT, "must be 0 states .* got 2"),
    "epoch of text": (having(epoch="one"), FIT, "`epoch`"),
    "no step": (without("global_step"), FIT, "`global_step`"),
    "data of text": (having(EightGaussians="one"), FIT, "EightGaussians|does not restore|pos"),
}
DATA = ["--data=EightGaussians", "--data.num_samples=64", "--data.num_validation=16"]
DATA += ["--data.batch_size=16"]
FLAGS = {
    "predict": ["--num_samples=3"],
    "fit": [*DATA, "--trainer.max_steps=3"],
    "audit": [*DATA, "--budget=1"],
}
CASES = [(kind, command) for kind, (_, commands, _) in DAMAGED.items() for command in commands]
# most of what every command refuses without a command line: to parse it takes nearly all the time
FIRST = [
    (kind, commands[min(number % 8, len(commands) - 1) if commands is ALL else 0])
    for number, (kind, (_, commands, _)) in enumerate(DAMAGED.items())
]


def refusal(command, path, capsys):
    """The line with which a command refuses a checkpoint."""
    if command == "load_from_checkpoint":
        with pytest.raises(ValueError, match="checkpoint") as error:
            DiffusionModule.load_from_checkpoint(path)
        return str(error.value)
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    quiet += ["--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    with pytest.raises(SystemExit) as exit_:
        main([command, f"--ckpt_path={path}", *quiet, *FLAGS[command]])
    assert exit_.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    return errors[-1]


def check(kind, command, good, capsys):
    damage, _, words = DAMAGED[kind]
    Path("damaged.ckpt").write_bytes(damage(good))
    line = refusal(command, "damaged.ckpt", capsys)
    assert re.search(words, line), line
    assert "\n" not in line
    assert len(line) < 700, line
    assert "damaged.ckpt" in line or "`" in line, line
    assert ": " in line.removeprefix("error: "), line


@pytest.mark.parametrize(("kind", "command"), FIRST, ids=lambda value: value)
def test_a_damaged_checkpoint_is_one_line(kind, command, good, capsys):
    check(kind, command, good, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "command"), CASES, ids=lambda value: value)
def test_a_damaged_checkpoint_is_one_line_of_every_command(kind, command, good, capsys):
    check(kind, command, good, capsys)


@pytest.mark.parametrize("command", ALL)
def test_what_is_no_file_is_named_as_such(command, capsys):
    Path("folder.ckpt").mkdir()
    os.mkfifo("pipe.ckpt")
    Path("config.yaml").write_text("model: {}")
    assert "folder.ckpt, which is a folder" in refusal(command, "folder.ckpt", capsys)
    assert "pipe.ckpt, which is no file" in refusal(command, "pipe.ckpt", capsys)
    assert "there is no file none.ckpt" in refusal(command, "none.ckpt", capsys)
    assert "a YAML file, as --config takes it" in refusal(command, "config.yaml", capsys)


def test_a_file_in_the_older_format_of_torch_loads(good):
    torch.save(content(good), "old.ckpt", _use_new_zipfile_serialization=False)
    assert DiffusionModule.load_from_checkpoint("old.ckpt").sample_shape == (2,)
