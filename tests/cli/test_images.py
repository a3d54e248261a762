"""Images of the user's own and the data's own settings on the command line."""

import pytest
import torch
from commands import SHORT, write

from lightning_vr import DiffusionModule
from lightning_vr.cli import main
from lightning_vr.cli.vr_cli import VRCLI
from tests.support.images import random_picture

UNET = {
    "class_path": "diffusers.UNet2DModel",
    "init_args": {
        "sample_size": 8,
        "block_out_channels": [8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
    },
}
IMAGES = ["--data=ImageFolder", "--data.path=images", "--data.size=8", "--data.batch_size=2"]


@pytest.fixture(autouse=True)
def images(folder):
    (folder / "images").mkdir()
    for i in range(6):
        random_picture(i, 40, 40).save(folder / f"images/{i}.jpg")
    return folder / "images"


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_breaks_in_training_is_one_line(folder, images, refused, workers):
    for path in images.iterdir():  # headers are whole
        path.write_bytes(path.read_bytes()[:-200])
    config = write(folder / "unet.yaml", model={"init_args": {"network": UNET}})
    network = [f"--config={config}", "--trainer.num_sanity_val_steps=0"]
    line = refused("fit", f"--data.num_workers={workers}", network=network, data=IMAGES)
    assert line.startswith("error: Image images/")
    assert "cannot be read (OSError: image file is truncated" in line
    assert line.endswith("repair or remove it.")
    assert "Traceback" not in line


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("#0a141e", (10, 20, 30)), ("[10, 20, 30]", (10, 20, 30)), ("black", (0, 0, 0))],
)
def test_background_is_a_name_a_code_or_numbers(flag, expected):
    flags = [f"--data.background={flag}", "--data.channels=4", "--data.cache_bytes=0"]
    network = ["--model.network=ResidualMLP", "--trainer.accelerator=cpu"]
    cli = VRCLI(args=[*network, *IMAGES, *flags], run=False)
    assert cli.datamodule.background == expected
    assert cli.datamodule.shape == (4, 8, 8)


def test_sigma_data_is_the_datas_own_and_stays_so(run, folder, recwarn):
    trained = run("fit", "--model.sigma_data=auto")
    checkpoint = trained / "checkpoints/last.ckpt"
    number = torch.load(checkpoint, weights_only=True)["hyper_parameters"]["sigma_data"]
    assert number == pytest.approx(1, abs=0.05)
    assert DiffusionModule.load_from_checkpoint(checkpoint).sigma_data == number

    common = [f"--config={trained}/config.yaml", f"--ckpt_path={checkpoint}"]
    main(["predict", *common, "--num_samples=1", "--model.sampler.steps=2"])
    main(["fit", *common, *SHORT, "--trainer.max_steps=3"])
    assert not [x for x in recwarn if "sigma_data" in str(x.message)]


def test_sigma_data_that_no_data_knows_is_refused(refused):
    line = refused("fit", "--model.sigma_data=wide")
    assert "sigma_data" in line
    assert "'auto'" in line
