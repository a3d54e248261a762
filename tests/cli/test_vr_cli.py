"""What the command line gives its trainer."""

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_vr.cli.vr_cli import VRCLI
from lightning_vr.lifecycle.step_progress_bar import StepProgressBar


@pytest.mark.parametrize(
    ("settings", "bar"),
    [
        ({}, StepProgressBar),
        ({"callbacks": {"class_path": "ModelCheckpoint"}}, StepProgressBar),
        ({"callbacks": [{"class_path": "ModelCheckpoint"}]}, StepProgressBar),
        ({"callbacks": [{"class_path": "RichProgressBar"}]}, RichProgressBar),
        ({"callbacks": {"class_path": "TQDMProgressBar"}}, TQDMProgressBar),
        ({"enable_progress_bar": False}, type(None)),
    ],
    ids=["none", "other callback", "list of others", "rich", "tqdm", "disabled"],
)
def test_the_progress_bar_counts_steps_unless_one_is_configured(settings, bar):
    model = {
        "class_path": "DiffusionModule",
        "init_args": {"network": {"class_path": "ResidualMLP"}},
    }
    trainer = {"max_steps": 5, "accelerator": "cpu"} | settings
    data = {"class_path": "EightGaussians"}
    cli = VRCLI(args={"model": model, "data": data, "trainer": trainer}, run=False)
    assert type(cli.trainer.progress_bar_callback) is bar
