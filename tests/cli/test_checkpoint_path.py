"""Settings together with ``--ckpt_path``: each takes effect or is refused; none is ignored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import NETWORK, run_in, settings, write
from lightning.pytorch import Trainer, seed_everything

from lightning_vr import STF, DiffusionModule, ResidualMLP
from lightning_vr.data import EightGaussians

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The last checkpoint of a short run that is far from the defaults."""
    flags = [
        "--model.target=STF",
        "--model.target.references=16",
        "--model.sampler.steps=4",
        "--model.sampler.solver=Euler",
        "--model.optimizer=AdamW",
        "--model.optimizer.lr=0.01",
        "--model.lr_scheduler=StepLR",
        "--model.lr_scheduler.step_size=100",
        "--seed_everything=3",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        return str(run_in(Path.cwd(), "fit", *flags) / "checkpoints/last.ckpt")


@pytest.fixture
def same():
    """Flags that repeat what ``trained`` was trained with."""
    return [
        *NETWORK,
        "--model.optimizer=torch.optim.adamw.AdamW",
        "--model.optimizer.lr=1e-2",
        "--model.lr_scheduler=StepLR",
        "--model.lr_scheduler.step_size=100",
    ]


def test_without_a_configured_model_the_checkpoint_builds_it(run, trained):
    folder = run("validate", "--ckpt_path", trained, network=[])
    model = settings(folder)["model"]["init_args"]
    assert model["target"]["init_args"]["references"] == 16
    assert model["network"]["init_args"]["width"] == 16


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_settings_without_a_network_override_those_of_the_checkpoint(command, run, trained):
    flags = ["--model.sampler.steps=7", "--model.on_nonfinite=skip", "--trainer.max_steps=3"]
    model = settings(run(command, *flags, "--ckpt_path", trained, network=[]))["model"]["init_args"]
    solver = model["sampler"]["solver"]["class_path"]
    assert (model["sampler"]["steps"], solver.rpartition(".")[2]) == (7, "Euler")
    assert model["on_nonfinite"] == "skip"
    assert model["target"]["init_args"]["references"] == 16


@pytest.mark.parametrize("option", ["-c", "--config"])
def test_a_checkpoint_that_a_file_names_builds_the_module_too(option, run, trained, folder):
    file = write(folder / "named.yaml", ckpt_path=trained)
    flags = [option, str(file), "--model.sampler.steps=7"]
    model = settings(run("validate", *flags, network=[]))["model"]["init_args"]
    assert (model["sampler"]["steps"], model["sampler"]["solver"]) == (
        7,
        {"class_path": "lightning_vr.Euler"},
    )


def test_a_configured_network_leaves_the_whole_module_to_the_configuration(run, trained):
    model = settings(run("validate", "--ckpt_path", trained))["model"]["init_args"]
    assert model["target"] is None
    assert model["sampler"] is None


def test_a_configured_loss_takes_effect_on_the_weights_of_the_checkpoint(run, trained):
    def loss(*flags):
        folder = run("validate", "--ckpt_path", trained, *flags)
        return float((folder / "metrics.csv").read_text().splitlines()[-1].split(",")[-1])

    weighted = ["--model.weighting=MinSNRWeighting"]
    plain = loss()
    assert plain == loss()
    assert plain != loss(*weighted) != loss(*weighted, "--model.weighting.gamma=1")


def test_resuming_with_the_same_settings_continues(run, trained, same):
    folder = run("fit", "--ckpt_path", trained, "--trainer.max_steps=4", network=same)
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01


def test_resuming_without_settings_takes_those_of_the_checkpoint(run, trained):
    folder = run("fit", "--ckpt_path", trained, "--trainer.max_steps=4", network=[])
    assert settings(folder)["seed_everything"] == 3
    assert settings(folder)["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01


def test_resuming_with_another_estimator_trains_with_it(run, trained, same):
    flags = ["--model.target=STF", "--model.target.references=all", "--trainer.max_steps=3"]
    folder = run("fit", "--ckpt_path", trained, *flags, network=same)
    module = DiffusionModule.load_from_checkpoint(folder / "checkpoints/last.ckpt")
    assert isinstance(module.target, STF)
    assert module.target.references == "all"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.optimizer.lr=0.02"], ["`model.optimizer.lr` must be 0.01, as in", "got 0.02"]),
        (
            ["--model.optimizer.weight_decay=0"],
            ["`model.optimizer.weight_decay` must be 0.01", "got 0"],
        ),
        (
            ["--model.optimizer=SGD"],
            ["`model.optimizer` must be", "AdamW", "got torch.optim.sgd.SGD"],
        ),
        (
            ["--model.lr_scheduler.step_size=9"],
            ["`model.lr_scheduler.step_size` must be 100", "got 9"],
        ),
        (["--model.lr_scheduler=null"], ["`model.lr_scheduler` must be", "StepLR", "got None"]),
        (["--seed_everything=4"], ["`seed_everything` must be 3", "got 4"]),
    ],
    ids=lambda flags: flags[0] if flags[0].startswith("--") else "",
)
def test_resuming_refuses_what_the_restored_state_would_undo(flags, words, refused, trained, same):
    error = refused("fit", *flags, "--ckpt_path", trained, network=same)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("name", ["optimizer.lr=0.02", "lr_scheduler.step_size=9"])
def test_resuming_refuses_the_same_where_the_checkpoint_builds_the_module(name, refused, trained):
    error = refused("fit", f"--model.{name}", "--ckpt_path", trained, network=[])
    assert name.partition("=")[0].partition(".")[0] in error


def test_another_learning_rate_is_allowed_where_nothing_is_trained(run, trained):
    run("validate", "--ckpt_path", trained, "--model.optimizer.lr=0.02", network=[])


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_network_of_another_shape_is_one_line(command, refused, trained, same):
    flags = ["--ckpt_path", trained, "--model.network.width=32"]
    error = refused(command, *flags, network=same)
    assert all(word in error for word in ("network.", "(16,", "(32,", "last.ckpt")), error


@pytest.mark.parametrize(
    ("flag", "setting"),
    [
        ("--model.schedule=VE", "model.schedule"),
        ("--model.prediction=epsilon", "model.prediction"),
        ("--model.sigma_data=0.7", "model.sigma_data"),
    ],
)
def test_weights_that_were_trained_for_something_else_raise_a_warning(flag, setting, run, trained):
    with pytest.warns(UserWarning, match=rf"Setting `{setting}` is .*whose weights were trained"):
        run("validate", "--ckpt_path", trained, flag)


@pytest.mark.parametrize("flag", ["--model.schedule=EDM", "--model.sigma_data=0.5"])
def test_what_weights_were_trained_for_may_be_said_again(flag, run, trained, recwarn):
    run("validate", "--ckpt_path", trained, flag)
    assert not [each for each in recwarn if "weights were trained" in str(each.message)]


def test_a_missing_file_or_one_that_is_no_checkpoint_is_refused(refused, folder):
    (folder / "words.ckpt").write_text("words")
    assert "no file nonesuch.ckpt" in refused("validate", "--ckpt_path=nonesuch.ckpt")
    error = refused("validate", "--ckpt_path=words.ckpt")
    assert "`ckpt_path` must be a checkpoint that loads safely, got words.ckpt" in error


def test_the_best_checkpoint_of_no_fit_is_refused_in_one_line(refused):
    assert "best" in refused("validate", "--ckpt_path=best")


@pytest.mark.parametrize("network", [[], NETWORK], ids=["described", "configured"])
def test_a_run_of_python_resumes_on_the_command_line(network, run, folder):
    trainer = Trainer(
        max_steps=2,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    seed_everything(5)
    trainer.fit(DiffusionModule(ResidualMLP(width=16, depth=1)), EightGaussians(num_samples=512))
    trainer.save_checkpoint("python.ckpt", weights_only=False)

    flags = ["--ckpt_path=python.ckpt", "--trainer.max_steps=3"]
    assert settings(run("fit", *flags, network=network))["seed_everything"] == 5
    run("predict", *flags[:1], "--num_samples=3", network=network, data=[])


@pytest.fixture
def objects(trained):
    """A checkpoint with arguments that no configuration rebuilds."""

    def write(*names):
        checkpoint = torch.load(trained, weights_only=True)
        checkpoint["lightning_vr"]["objects"] = list(names)
        for name in names:
            del checkpoint["hyper_parameters"][name]
        torch.save(checkpoint, "objects.ckpt")
        return "--ckpt_path=objects.ckpt"

    return write


def test_a_network_that_no_configuration_rebuilds_must_be_configured(refused, run, objects):
    checkpoint = objects("network")
    assert "`network`" in refused("validate", checkpoint, network=[])
    run("validate", checkpoint)


def test_an_optimizer_that_no_configuration_rebuilds_prevents_only_training(
    refused, run, objects, same
):
    checkpoint = objects("optimizer", "lr_scheduler")
    run("validate", checkpoint, network=[])
    for network in ([], same):
        assert "`model.optimizer`" in refused("fit", checkpoint, network=network)


def test_a_schedule_that_is_a_function_prevents_only_training(refused, run, trained, folder):
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["hyper_parameters"]["lr_scheduler"] = {
        "class_path": "diffusers.optimization.get_constant_schedule_with_warmup",
        "init_args": {"num_warmup_steps": 2},
    }
    torch.save(checkpoint, "function.ckpt")
    run("validate", "--ckpt_path=function.ckpt", network=[])
    assert "`model.lr_scheduler`" in refused("fit", "--ckpt_path=function.ckpt", network=[])


def test_validating_with_another_seed_uses_other_noise(run, trained):
    def loss(seed):
        folder = run("validate", "--ckpt_path", trained, f"--seed_everything={seed}", network=[])
        return (folder / "metrics.csv").read_text()

    assert loss(3) == loss(3) != loss(4)


def test_predicting_with_another_seed_draws_other_samples(run, trained):
    def samples(seed):
        flags = [f"--seed_everything={seed}", "--num_samples=4", "--ckpt_path", trained]
        with np.load(run("predict", *flags, network=[], data=[]) / "samples.npz") as file:
            return file["samples"].tolist()

    assert samples(3) == samples(3) != samples(4)
