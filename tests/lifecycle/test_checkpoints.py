"""Checkpoints reload, whoever built the module; what cannot be rebuilt is named."""

import functools

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from support.configured import everything
from support.networks import small_unet
from torch import nn

from lightning_vr import VP, DiffusionModule, ResidualMLP, Sampler
from lightning_vr.cli import VRCLI
from lightning_vr.data import Digits, EightGaussians


class Fixed(DiffusionModule):
    """Builds its own network, one that no configuration could rebuild."""

    def __init__(self, width: int = 8):
        network = ResidualMLP(width=width, depth=1)
        network.blocks[0][2] = nn.ReLU()
        super().__init__(network)
        self.width = width


class Keywords(DiffusionModule):
    def __init__(self, scale: float = 2.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale


class Positional(DiffusionModule):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Unfollowed(DiffusionModule):
    """Passes its keywords on in a way that no parser follows."""

    def __init__(self, scale: float = 2.0, **kwargs):
        options = {"sigma_data": 0.7, **kwargs}
        super().__init__(**options)


class Saving(DiffusionModule):
    """Saves its hyperparameters again, as Lightning's documentation teaches."""

    def __init__(self, encoder: nn.Module, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.save_hyperparameters(ignore=["encoder", "network"])


class Hiding(DiffusionModule):
    """Keeps a network outside its weights."""

    def __init__(self, encoder: nn.Module, **kwargs):
        super().__init__(**kwargs)
        self.encoder = [encoder]


class Student(DiffusionModule):
    """Builds a module of its base class, and one of its own class, in its constructor."""

    def __init__(self, width: int, has_teachers: bool = True):
        super().__init__(ResidualMLP(width=width, depth=1))
        if has_teachers:
            self.teachers = [
                DiffusionModule(network(), prediction="v"),
                Student(width + 2, has_teachers=False),
            ]


class Aloof(DiffusionModule):
    """Calls its base class by name, so that no call can be followed out to its own arguments."""

    def __init__(self, width: int, depth: int = 1):
        DiffusionModule.__init__(self, ResidualMLP(width=width, depth=depth))


class PartlyPositional(DiffusionModule):
    def __init__(self, scale: float, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale


class Outer(LightningModule):
    def __init__(self, inner_width: int):
        super().__init__()
        self.inner = DiffusionModule(ResidualMLP(width=inner_width))


class Local(nn.Module):
    """A network of a user's own, without annotations."""

    def __init__(self, width, inner=None):
        super().__init__()
        self.width, self.inner = width, inner
        self.project = nn.Linear(2, 2)

    def forward(self, x, t):
        return self.project(x)


def network():
    return ResidualMLP(width=8, depth=1)


@pytest.fixture
def saved(tmp_path):
    """Train a module for one step; return its checkpoint."""

    def save(module, name="module.ckpt", data=None):
        trainer = Trainer(
            max_steps=1,
            logger=False,
            accelerator="cpu",
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data or EightGaussians(num_samples=256))
        trainer.save_checkpoint(tmp_path / name, weights_only=False)
        return tmp_path / name

    return save


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_all_arguments_reload(saved):
    module = everything()
    again = DiffusionModule.load_from_checkpoint(saved(module))

    assert same_weights(again, module)
    assert isinstance(again.schedule, VP)
    assert (again.prediction, again.target.references) == ("v", "all")
    assert (again.timesteps.mean, again.sampler.steps) == (-1.0, 3)
    optimizers = again.configure_optimizers()
    group = optimizers["optimizer"].param_groups[0]
    assert (group["lr"], group["betas"]) == (0.01, (0.9, 0.95))
    assert optimizers["lr_scheduler"]["scheduler"].step_size == 3


def test_what_was_reloaded_reloads_again(saved):
    first = saved(everything())
    module = DiffusionModule.load_from_checkpoint(first)
    again = DiffusionModule.load_from_checkpoint(saved(module, "again.ckpt"))
    assert same_weights(again, module)
    assert again.hparams == module.hparams == everything().hparams


def test_a_module_of_the_command_line_reloads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model.network=ResidualMLP", "--model.network.width=8", "--model.target=STF"]
    flags += ["--model.optimizer=SGD", "--model.optimizer.lr=0.1", "--model.sampler.steps=3"]
    flags += ["--data=EightGaussians", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]
    flags += ["--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0"]
    module = VRCLI(args=["fit", *flags]).model
    (path,) = tmp_path.rglob("*.ckpt")

    again = DiffusionModule.load_from_checkpoint(path)

    assert same_weights(again, module)
    assert (again.target.references, again.sampler.steps) == ("batch", 3)
    assert again.configure_optimizers().param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(6),
        lambda: Keywords(3.0, network=network(), schedule=VP()),
        lambda: Positional(network(), VP()),
        lambda: PartlyPositional(3.0, network(), VP()),
        lambda: Unfollowed(network=network(), schedule=VP()),
        lambda: Saving(ResidualMLP(width=4), network=network()),
        lambda: DiffusionModule(Local(3, Local(2))),
    ],
    ids=["own", "keywords", "positional", "partly positional", "unfollowed", "saving", "network"],
)
def test_subclasses_reload_from_the_base_class(make, saved):
    module = make()
    again = DiffusionModule.load_from_checkpoint(saved(module))
    assert type(again) is type(module)
    assert same_weights(again, module)
    assert type(again.schedule) is type(module.schedule)
    assert getattr(again, "scale", None) == getattr(module, "scale", None)
    assert again.sigma_data == module.sigma_data


def test_what_diffusers_makes_reloads(saved):
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup

    from lightning_vr import DiffusersSchedule

    unet = small_unet()
    cosine = functools.partial(
        get_cosine_schedule_with_warmup, num_warmup_steps=2, num_training_steps=9
    )
    schedule = DiffusersSchedule(DDPMScheduler(beta_end=0.01))
    module = DiffusionModule(unet, schedule, "epsilon", lr_scheduler=cosine)

    again = DiffusionModule.load_from_checkpoint(saved(module, data=Digits()))

    assert same_weights(again, module)
    assert again.schedule.scheduler.config.beta_end == 0.01
    assert again.lr_scheduler.function.func is get_cosine_schedule_with_warmup
    assert again.lr_scheduler.function.keywords == cosine.keywords


@pytest.mark.parametrize("kind", [DiffusionModule, Keywords])
def test_a_scheduler_of_diffusers_given_as_the_schedule_reloads(saved, kind):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    module = kind(network=network(), schedule=scheduler, prediction="velocity")
    again = kind.load_from_checkpoint(saved(module))
    assert again.schedule.scheduler.config.shift == 3.0
    assert again.timesteps.shift == 3.0


def test_a_subclass_loads_the_checkpoint_of_its_base_class(saved):
    again = Keywords.load_from_checkpoint(saved(DiffusionModule(network())), scale=5.0)
    assert (type(again), again.scale) == (Keywords, 5.0)


def test_arguments_can_be_replaced(saved):
    path = saved(everything())
    again = DiffusionModule.load_from_checkpoint(path, sampler=Sampler(steps=9), prediction="x0")
    assert (again.sampler.steps, again.prediction) == (9, "x0")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network", nn.Sequential()),
        ("optimizer", lambda parameters: torch.optim.SGD(parameters, 0.1)),
    ],
)
def test_an_object_that_no_configuration_rebuilds_is_named_and_can_be_given(name, value, saved):
    arguments = {"network": network(), name: value}
    if name == "network":
        value.append(nn.Linear(2, 2))
        value.forward = lambda x, t: value[0](x)
    module = DiffusionModule(**arguments)
    path = saved(module)
    with pytest.raises(ValueError, match=f"`{name}`.*load_from_checkpoint\\(path, {name}=...\\)"):
        DiffusionModule.load_from_checkpoint(path)
    again = DiffusionModule.load_from_checkpoint(path, **{name: value})
    assert same_weights(again, module)


def test_a_network_outside_of_the_weights_must_be_given_again(saved):
    path = saved(Hiding(ResidualMLP(width=4), network=network()))
    with pytest.raises(ValueError, match="`encoder`"):
        Hiding.load_from_checkpoint(path)
    encoder = ResidualMLP(width=4)
    assert Hiding.load_from_checkpoint(path, encoder=encoder).encoder[0] is encoder


def test_weights_that_do_not_fit_are_one_line(saved):
    with pytest.raises(ValueError, match=r"`network\..*\(8, 2\) there and \(16, 2\)"):
        DiffusionModule.load_from_checkpoint(
            saved(everything()), network=ResidualMLP(width=16, depth=1)
        )


def test_strictness_is_a_choice(saved):
    path = saved(everything())
    again = DiffusionModule.load_from_checkpoint(
        path, network=ResidualMLP(width=8, depth=1, num_class_embeds=3), strict=False
    )
    assert again.network.embed_class is not None


def test_a_module_inside_of_another_keeps_to_its_own_arguments():
    assert "inner_width" not in Outer(8).inner.hparams
    student = Student(8)
    teacher, twin = student.teachers
    assert (student.hparams.width, student.hparams.has_teachers) == (8, True)
    assert (twin.hparams.width, twin.hparams.has_teachers) == (10, False)
    assert teacher.hparams.prediction == "v"
    assert "width" not in teacher.hparams


def test_arguments_that_cannot_be_followed_are_named_and_can_be_given(saved):
    module = Aloof(8, depth=2)
    path = saved(module)
    with pytest.raises(ValueError, match=r"`width` .*must be given again.*\(path, width=...\)"):
        Aloof.load_from_checkpoint(path)
    assert same_weights(Aloof.load_from_checkpoint(path, width=8, depth=2), module)


def test_a_class_that_is_not_imported_is_named(saved):
    path = saved(everything())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = "nowhere.Nonesuch"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"holds a nowhere\.Nonesuch, which is not imported"):
        DiffusionModule.load_from_checkpoint(path)


@pytest.mark.parametrize("class_path", ["lightning_vr.DiffusionModule", "__main__.DiffusionModule"])
def test_a_class_is_found_under_its_other_names(class_path, saved):
    path = saved(everything())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = class_path
    torch.save(checkpoint, path)
    assert type(DiffusionModule.load_from_checkpoint(path)) is DiffusionModule


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"width": 3}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt does not rebuild a DiffusionModule"):
        DiffusionModule.load_from_checkpoint(tmp_path / "other.ckpt")


def test_an_open_file_reloads(saved):
    with saved(everything()).open("rb") as file:
        assert DiffusionModule.load_from_checkpoint(file).prediction == "v"
