"""Settings: short names, files that parse to themselves, and errors in one line."""

import pytest
import yaml
from commands import NETWORK, POINTS, SHORT, write

from lightning_vr import DSM, STF, DiffusionModule, ResidualMLP
from lightning_vr.cli import VRCLI, main
from lightning_vr.data import EightGaussians


def printed(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        main([*args, "--print_config"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_short_class_names_are_enough(folder):
    callbacks = [{"class_path": "TargetVariance"}, {"class_path": "SampleGrid"}]
    file = write(folder / "callbacks.yaml", trainer={"callbacks": callbacks})
    flags = ["--model.target", "STF", "--model.target.references", "16", "--model.schedule", "VP"]
    flags += ["--model.network", "ResidualMLP", "--data", "EightGaussians"]

    cli = VRCLI(args=["--config", str(file), *flags, *SHORT], run=False)

    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert {"TargetVariance", "SampleGrid"} <= set(names)
    assert isinstance(cli.model, DiffusionModule)
    assert isinstance(cli.model.network, ResidualMLP)
    assert isinstance(cli.datamodule, EightGaussians)
    assert (type(cli.model.target), cli.model.target.references) == (STF, 16)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_printed_configuration_parses_to_itself(command, capsys, folder):
    first = printed(capsys, command, *NETWORK, *POINTS, *SHORT, "--model.target=STF")
    file = folder / "printed.yaml"
    file.write_text(first)

    assert printed(capsys, command, "--config", str(file)) == first
    assert "STF" in first


def test_the_saved_configuration_repeats_the_run(run):
    first = run("fit", "--seed_everything=3", "--model.target=STF")
    again = run("fit", "--config", str(first / "config.yaml"), network=[], data=[], short=[])

    saved, repeated = (yaml.safe_load((f / "config.yaml").read_text()) for f in (first, again))
    assert saved == repeated
    assert (first / "metrics.csv").read_text() == (again / "metrics.csv").read_text()


def test_a_control_variate_is_fitted_and_logged(run):
    control = {"order": 1, "gate": [0.0, 0.3], "refit_every_n_steps": 1}
    flags = [f"--model.control_variate.{name}={value}" for name, value in control.items()]
    folder = run("fit", "--model.control_variate=TaylorCV", *flags)
    assert "control_variate/reduction" in (folder / "metrics.csv").read_text().splitlines()[0]
    header = (folder / "control_variate.csv").read_text().splitlines()[0]
    assert header == "step,noise_level,open,reduction,odd,even"


def test_a_run_folder_that_exists_can_be_used_again(run, folder):
    flags = [*NETWORK, *POINTS, *SHORT, "--trainer.logger.version=0"]
    main(["fit", *flags])
    with (
        pytest.warns(UserWarning, match="exists and is not empty"),
        pytest.warns(UserWarning, match="of an earlier run: its rows are dropped"),
    ):
        main(["fit", *flags, "--model.sigma_data=0.25"])
    run = folder / "runs/version_0"
    assert "sigma_data: 0.25" in (run / "config_1.yaml").read_text()
    assert "sigma_data: 0.25" not in (run / "config.yaml").read_text()


def test_a_module_of_ones_own_is_named_by_its_path(folder, monkeypatch):
    (folder / "mine.py").write_text(
        "from torch import nn\n"
        "from lightning_vr import DiffusionModule\n"
        "class Mine(DiffusionModule):\n"
        "    def __init__(self, network: nn.Module, scale: float = 1.0):\n"
        "        super().__init__(network)\n"
        "        self.scale = scale\n"
    )
    monkeypatch.syspath_prepend(folder)
    flags = ["--model=mine.Mine", "--model.scale=3"]

    cli = VRCLI(args=[*flags, *NETWORK, *POINTS, *SHORT], run=False)

    assert type(cli.model).__name__ == "Mine"
    assert cli.model.scale == 3
    assert isinstance(cli.model.target, DSM)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.prediction=noise"], ["model.prediction", "'epsilon'", "noise"]),
        (["--model.network.width=wide"], ["model.network.width", "int", "wide"]),
        (["--model.network.width=3"], ["`width`", "3"]),
        (["--model.network=Nonesuch"], ["`model.network` must be a class", "Nonesuch"]),
        (["--model.sigma=3"], ["`model.sigma` is not an argument of DiffusionModule"]),
        (["--model.target=STF", "--model.target.references=513"], ["`references`", "512", "513"]),
        (["--trainer.precision=3"], ["trainer.precision", "3"]),
        (["--trainer.devices=0"], ["devices", "0"]),
        (["--nonesuch=1"], ["`--nonesuch` is not a setting"]),
        (["--config=nonesuch.yaml"], ["config", "does not exist", "nonesuch.yaml"]),
        # what finds these has found another of them
        pytest.param(
            ["--model.target=STF", "--model.target.references=few"],
            ["model.target.ref", "few"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--model.control_variate=TaylorCV", "--model.control_variate.order=3"],
            ["`order`", "3"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--model.label_dropout=0.1"],
            ["`label_dropout`", "num_classes"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--model.optimizer=AdamW", "--model.optimizer.lr=-1"],
            ["learning rate", "-1"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--data=Nonesuch"], ["`data` must be a class", "Nonesuch"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--data.batch_size=513"], ["`batch_size`", "512", "513"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--trainer.max_steps=many"],
            ["trainer.max_steps", "int", "many"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda flags: flags[-1] if flags[-1].startswith("--") else "",
)
def test_a_wrong_setting_is_one_line_that_names_it(flags, words, refused):
    error = refused("fit", *flags)
    assert all(word in error for word in words), error
    assert "NoneType" not in error


def settings(*flags):
    return VRCLI(args=[*NETWORK, *POINTS, *SHORT, *flags], run=False).config.as_dict()


@pytest.mark.parametrize("write", ["--{}=null", "--{} null"])
@pytest.mark.parametrize(
    ("before", "name"),
    [
        (["--model.network.num_class_embeds=9"], "model.network.num_class_embeds"),
        (["--model.num_classes=8", "--model.network.num_class_embeds=9"], "model.num_classes"),
        (["--model.optimizer=AdamW", "--model.optimizer.fused=true"], "model.optimizer.fused"),
        (["--model.draws=CARV", "--model.draws.chunk_size=2"], "model.draws.chunk_size"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=a"], "trainer.logger.version"),
        (["--trainer.max_time=00:00:01:00"], "trainer.max_time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_null_on_the_command_line_is_none_at_any_depth(write, before, name, folder):
    value = settings(*before, *write.format(name).split(" "))
    for key in name.split("."):
        value = value.get("init_args", value)[key]
    assert value is None


def test_null_on_the_command_line_is_none_for_a_callback_of_a_list(folder):
    flags = ["--trainer.callbacks=SampleGrid", "--trainer.callbacks+=ModelCheckpoint"]
    found = settings(
        *flags, "--trainer.callbacks.save_last=true", "--trainer.callbacks.save_last=null"
    )
    assert found["trainer"]["callbacks"][1]["init_args"]["save_last"] is None


class Described(ResidualMLP):
    """A network with arguments that hold null, text and numbers at some depth."""

    def __init__(self, sizes: list[int | None], names: dict[str, str | float | None]):
        super().__init__(width=16, depth=1)


def test_lists_and_dictionaries_on_the_command_line_are_what_yaml_says(folder):
    flags = ["--model.network", f"{__name__}.Described"]
    flags += ["--model.network.sizes=[null, 3]"]
    flags += ["--model.network.names={a: null, b: None, c: \"it's\", d: .inf, e: 'null'}"]
    cli = VRCLI(args=[*flags, *POINTS, *SHORT], run=False)
    found = cli.config.model.init_args.network.init_args
    assert found.sizes == [None, 3]
    assert found.names == {"a": None, "b": "None", "c": "it's", "d": float("inf"), "e": "null"}


def test_the_word_none_is_no_null(refused):
    line = refused("fit", "--model.network.num_class_embeds=None")
    assert "`model.network.num_class_embeds` must be int" in line


@pytest.mark.parametrize("as_file", [True, False])
def test_the_short_name_of_the_schedule_on_plateaus_is_enough(as_file, folder):
    schedule = {"class_path": "ReduceLROnPlateau", "init_args": {"monitor": "val/loss"}}
    flags = ["--model.lr_scheduler", "ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss"]
    if as_file:
        file = write(folder / "plateau.yaml", model={"init_args": {"lr_scheduler": schedule}})
        flags = ["--config", str(file)]
    found = settings(*flags)["model"]["init_args"]["lr_scheduler"]
    assert found["class_path"] == "lightning.pytorch.cli.ReduceLROnPlateau"
    assert found["init_args"]["monitor"] == "val/loss"


def test_the_short_name_is_enough_in_settings_that_python_gives():
    schedule = {"class_path": "ReduceLROnPlateau", "init_args": {"monitor": "val/loss"}}
    model = {"network": {"class_path": "ResidualMLP"}, "lr_scheduler": schedule}
    given = {"model": {"class_path": "DiffusionModule", "init_args": model}}
    cli = VRCLI(args={**given, "data": {"class_path": "EightGaussians"}}, run=False)
    found = cli.config.model.init_args.lr_scheduler
    assert found.class_path == "lightning.pytorch.cli.ReduceLROnPlateau"


@pytest.mark.parametrize("as_file", [True, False])
def test_text_that_looks_like_the_setting_of_a_schedule_stays_as_it_is(as_file, folder):
    text = "lr_scheduler=ReduceLROnPlateau"
    flags = [f"--trainer.logger.name={text}"]
    if as_file:
        file = write(folder / "name.yaml", trainer={"logger": {"init_args": {"name": text}}})
        flags = ["--config", str(file)]
    found = settings("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=a", *flags)
    assert found["trainer"]["logger"]["init_args"]["name"] == text


def test_torchs_own_schedule_on_plateaus_keeps_its_path():
    path = "torch.optim.lr_scheduler.ReduceLROnPlateau"
    found = settings(f"--model.lr_scheduler={path}")["model"]["init_args"]["lr_scheduler"]
    assert found["class_path"] == path


def test_settings_may_share_what_an_anchor_names(folder):
    (folder / "anchor.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "  - {class_path: SampleGrid, init_args: &n {samples: 9}}\n"
        "  - {class_path: FrechetDistance, init_args: *n}\n"
    )
    callbacks = settings("--config=anchor.yaml")["trainer"]["callbacks"]
    assert [each["init_args"]["samples"] for each in callbacks] == [9, 9]


def test_a_few_lines_of_aliases_that_stand_for_billions_are_refused(refused, folder):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (folder / "aliases.yaml").write_text("\n".join(lines))
    assert "more than 1000000 nodes" in refused("fit", "--config=aliases.yaml")


def test_running_out_of_memory_in_training_is_one_line(refused, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        )

    monkeypatch.setattr("lightning_vr.training.diffusion.Diffusion.compute_loss", fail)
    line = refused("fit")
    assert "8 bytes do not fit into the memory" in line
    assert "`batch_size`" in line


def test_a_broken_file_is_one_line(refused, folder):
    (folder / "broken.yaml").write_text("model: [")
    assert "`config` must be valid YAML" in refused("fit", "--config=broken.yaml")


def test_what_is_missing_is_named(refused):
    assert "`model` must be configured" in refused("fit", network=[])
    assert "network" in refused("fit", "--model.sampler.steps=3", network=[])
    assert "`data` must be configured" in refused("fit", data=[])
    assert "`data` must be configured" in refused("validate", data=[])
    assert "'nonesuch'" in refused("nonesuch")
    with pytest.raises(SystemExit):
        main([])


class Failing(ResidualMLP):
    """A network with a bug, in its constructor or in training."""

    def __init__(self, when: str):
        super().__init__(width=16, depth=1)
        if when == "construction":
            raise TypeError("a bug")

    def forward(self, x, t, class_labels=None):
        if self.training:
            raise ValueError("a bug")
        return super().forward(x, t)


@pytest.mark.parametrize("when", ["construction", "training"])
def test_a_bug_keeps_its_traceback(run, when):
    network = ["--model.network", f"{__name__}.Failing", f"--model.network.when={when}"]
    with pytest.raises(ValueError, match="a bug"):
        run("fit", network=network)


def test_the_traceback_of_a_wrong_setting_can_be_seen(run, monkeypatch):
    monkeypatch.setenv("LIGHTNING_VR_TRACEBACK", "1")
    with pytest.raises(ValueError, match="`width`"):
        run("fit", "--model.network.width=3")


def test_the_command_line_knows_its_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("lightning-vr ")
