"""``predict``: samples of a trained module as arrays and as a picture."""

import errno
import weakref

import numpy as np
import pytest
import torch
from commands import NETWORK, run_in, write
from PIL import Image
from support.conditions import captioned, embedded
from support.selections import mostly_slow

from lightning_vr import DiffusionModule, Sampler
from lightning_vr.cli import sample_writer
from lightning_vr.cli.sample_writer import SampleWriter
from lightning_vr.cli.vr_trainer import VRTrainer

pytestmark = pytest.mark.usefixtures("no_pictures")

FEW = ["--model.sampler.steps=3"]
LAST = "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a short run, for a network and data."""

    def train(*flags, **kwargs):
        folder = tmp_path_factory.mktemp("trained")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return ["--ckpt_path", str(run_in(folder, "fit", *flags, **kwargs) / LAST)]

    return train


@pytest.fixture(scope="module")
def points(trained):
    return trained("--trainer.limit_val_batches=0")


def arrays(folder):
    with np.load(folder / "samples.npz") as file:
        return dict(file)


@pytest.mark.pictures
def test_points_are_arrays_and_a_scatter_plot(run, points, capsys):
    folder = run("predict", *points, *FEW, "--num_samples=21", network=[], data=[])
    samples = arrays(folder)
    assert list(samples) == ["samples"]
    assert samples["samples"].shape == (21, 2)
    assert np.isfinite(samples["samples"]).all()
    with Image.open(folder / "samples.png") as picture:
        assert picture.width > 100
    assert f"21 samples in runs/{folder.name}: samples.npz, samples.png" in capsys.readouterr().out


def test_samples_that_cannot_be_written_leave_no_half_of_a_file(run, points, monkeypatch, folder):
    def half(file, **arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="No space left"):
        run("predict", *points, *FEW, "--num_samples=2", network=[], data=[])
    (made,) = (folder / "runs").iterdir()
    names = [path.name for path in made.iterdir()]
    assert not [name for name in names if "samples" in name or name.startswith(".")]


def test_classes_are_cycled_over(run, trained):
    network = [*NETWORK, "--model.network.num_class_embeds=9", "--model.num_classes=8"]
    checkpoint = trained(network=network)
    folder = run("predict", *checkpoint, *FEW, "--num_samples=21", network=[], data=[])
    assert arrays(folder)["labels"].tolist() == [i % 8 for i in range(21)]


def test_labels_of_a_file_are_what_samples_are_drawn_for(run, trained, folder):
    network = [*NETWORK, "--model.network.num_class_embeds=9", "--model.num_classes=8"]
    (folder / "labels.csv").write_text("label\n3\n5\n")
    asked = [*trained(network=network), *FEW, "--num_samples=5", "--conditions=labels.csv"]
    samples = arrays(run("predict", *asked, network=[], data=[]))
    assert samples["labels"].tolist() == [3, 5, 3, 5, 3]


def test_a_file_of_conditions_that_is_missing_is_named(run, points, capsys):
    with pytest.raises(SystemExit):
        run("predict", *points, *FEW, "--conditions=nope.csv", network=[], data=[])
    said = capsys.readouterr().err
    assert "error: `conditions` must be a text file in UTF-8, but nope.csv cannot be read" in said


def test_prompts_of_a_file_are_encoded_by_the_module_and_stand_beside_the_samples(folder):
    (folder / "prompts.txt").write_text("left\nup\n")
    model = captioned(sampler=Sampler(steps=2))
    model.sample_shape = (2,)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = VRTrainer(default_root_dir=folder, **settings)
    trainer.predict(model, num_samples=4, conditions=folder / "prompts.txt")
    (path,) = folder.glob("**/samples.npz")
    with np.load(path) as found:
        assert found["prompt"].tolist() == ["left", "up", "left", "up"]
        asked = embedded(["left", "up", "left", "up"])
        expected = model.sample(4, cond=asked, source=model.generator("predict", 0))
        assert np.array_equal(found["samples"], expected.numpy())


@pytest.mark.pictures
def test_images_are_a_grid_with_one_column_per_class(run, trained, folder):
    unet = {
        "class_path": "diffusers.UNet2DModel",
        "init_args": {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": [8],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"],
            "num_class_embeds": 11,
        },
    }
    settings = {"network": unet, "num_classes": 10}
    model = {"class_path": "DiffusionModule", "init_args": settings}
    config = ["--config", str(write(folder / "unet.yaml", model=model))]
    checkpoint = trained(network=config, data=["--data=Digits"])

    made = run("predict", *checkpoint, *FEW, "--num_samples=25", network=[], data=[])

    assert arrays(made)["samples"].shape == (25, 1, 8, 8)
    with Image.open(made / "samples.png") as picture:
        assert picture.width / picture.height == pytest.approx(10 / 3)


def test_samples_that_are_no_picture_are_arrays_alone(run, trained):
    data = ["--data=TwoGaussians", "--data.dimension=5", "--data.num_samples=512"]
    checkpoint = trained(network=[*NETWORK, "--model.network.dimension=5"], data=data)
    folder = run("predict", *checkpoint, *FEW, "--num_samples=3", network=[], data=[])
    assert arrays(folder)["samples"].shape == (3, 5)
    assert not (folder / "samples.png").exists()


def test_settings_of_the_sampler_take_effect(run, points):
    flags = [*points, "--num_samples=4"]
    solvers = (
        ["--model.sampler.solver=Heun"],
        ["--model.sampler.solver=DDIM", "--model.sampler.solver.eta=0.5"],
        [
            "--model.sampler.solver=DiffusersSolver",
            "--model.sampler.solver.scheduler=diffusers.EDMEulerScheduler",
            "--model.sampler.solver.scheduler.sigma_min=0.01",
        ],
    )
    heun, ddim, scheduler = (
        arrays(run("predict", *flags, *solver, *FEW, network=[], data=[]))["samples"]
        for solver in solvers
    )
    assert not np.allclose(heun, ddim)
    assert not np.allclose(scheduler, ddim)


def test_a_data_module_is_ignored(run, points):
    flags = [*points, *FEW, "--num_samples=4"]
    with_data, without = (
        arrays(run("predict", *flags, data=data)) for data in (["--data=Digits"], [])
    )
    assert np.array_equal(with_data["samples"], without["samples"])


def test_two_processes_write_all_samples_in_order_and_differ(run, trained):
    network = [*NETWORK, "--model.network.num_class_embeds=9", "--model.num_classes=8"]
    flags = [
        *trained(network=network),
        *FEW,
        "--num_samples=7",
        "--batch_size=2",
        "--trainer.devices=2",
        "--trainer.strategy=ddp_fork",
    ]
    samples = arrays(run("predict", *flags, network=[], data=[]))
    assert samples["samples"].shape == (7, 2)
    assert samples["labels"].tolist() == list(range(7))
    assert len(np.unique(samples["samples"], axis=0)) == 7


@pytest.mark.parametrize(
    ("devices", "num_samples"),
    mostly_slow([(1, 5), (2, 5), (2, 7), (2, 8), (2, 9)], [(1, 5), (2, 5), (2, 9)]),
)
def test_each_sample_is_where_its_request_is(run, points, monkeypatch, devices, num_samples):
    """Also where the last batch of a rank is short, or missing, as with 5 and 9 samples."""

    def where(module, batch, batch_idx):
        return batch["index"][:, None].float().expand(-1, 2)

    monkeypatch.setattr(DiffusionModule, "predict_step", where)
    several = [f"--trainer.devices={devices}", "--trainer.strategy=ddp_fork"]
    flags = [*points, f"--num_samples={num_samples}", "--batch_size=2", *several[: 2 * devices - 2]]
    samples = arrays(run("predict", *flags, network=[], data=[]))["samples"]
    assert samples.tolist() == [[i, i] for i in range(num_samples)]


def test_between_batches_no_sample_stays_where_it_was_made(run, points, monkeypatch):
    """Samples in bfloat16, that one on the CPU too can tell from those that are kept."""
    made, alive = [], []

    def draw(module, batch, batch_idx):
        alive.append(sum(sample() is not None for sample in made))
        found = batch["index"][:, None].bfloat16().expand(-1, 2)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(DiffusionModule, "predict_step", draw)
    flags = [*points, "--num_samples=9", "--batch_size=2"]
    samples = arrays(run("predict", *flags, network=[], data=[]))["samples"]
    assert alive == [0] * 5
    assert samples.dtype == np.float32
    assert samples.tolist() == [[i, i] for i in range(9)]


def test_the_samples_of_two_processes_are_kept_by_one_on_the_cpu(run, points, monkeypatch, folder):
    """A spy looks at what the writer of each rank holds before it writes."""
    write_samples = SampleWriter.on_predict_epoch_end

    def spy(writer, trainer, module):
        kept = [(str(x.device), x.dtype, len(x)) for x in writer._samples]
        torch.save(kept, folder / f"kept{trainer.global_rank}.pt")
        write_samples(writer, trainer, module)

    monkeypatch.setattr(SampleWriter, "on_predict_epoch_end", spy)
    several = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    flags = [*points, *FEW, *several, "--num_samples=7", "--batch_size=2"]
    run("predict", *flags, network=[], data=[])
    kept = [torch.load(folder / f"kept{rank}.pt") for rank in range(2)]
    assert kept == [[("cpu", torch.float32, 4), ("cpu", torch.float32, 3)], []]


def test_each_predict_of_a_trainer_writes_its_own_samples(points, folder):
    trainer = VRTrainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = DiffusionModule.load_from_checkpoint(points[1])
    callbacks = list(trainer.callbacks)
    for num_samples in (3, 5):
        trainer.predict(module, num_samples=num_samples)
        assert arrays(folder)["samples"].shape == (num_samples, 2)
        assert trainer.callbacks == callbacks


def test_what_predict_cannot_do_is_one_line(refused, points):
    assert "`ckpt_path`" in refused("predict")
    flags = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--num_samples=1"]
    assert "`num_samples`" in refused("predict", *points, *flags)
    assert "num_samples" in refused("predict", *points, "--num_samples=0")


@pytest.mark.parametrize("name", ["savez", "save_picture"])
def test_a_disk_that_is_full_is_one_line_and_a_status(name, points, run, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = sample_writer.np if name == "savez" else sample_writer
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(SystemExit) as exit_:
        run("predict", *points, *FEW, "--num_samples=2", network=[], data=[])
    assert exit_.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: The disk must have room for what the command writes, but is ful")
