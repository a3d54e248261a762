"""A checkpoint is data from a stranger: what it names is refused, not imported and not run."""

import functools
import os
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.networks import small_mlp
from support.trainers import quiet_trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler

from lightning_vr import DDIM, VP, DiffusionModule, ResumableModule, Sampler
from lightning_vr.data import EightGaussians

PACKAGE = """
from pathlib import Path

import torch
from torch import nn

import lightning_vr

Path("imported").touch()


class Descent(torch.optim.SGD):
    pass


class Strange(nn.Module):
    def __init__(self, width=2, inner=None):
        super().__init__()
        self.project = nn.Linear(2, 2)
        self.width, self.inner = width, inner

    def forward(self, x, t):
        return self.project(x)


class Plain:
    pass


class StrangeModule(lightning_vr.DiffusionModule):
    pass


def schedule(optimizer):
    Path("ran").touch()


def build(*args, **kwargs):
    Path("ran").touch()
"""


class Untyped(nn.Module):
    """Takes anything."""

    def __init__(self, inner=None, **options):
        super().__init__()
        self.inner, self.options = inner, options
        self.project = nn.Linear(2, 2)

    def forward(self, x, t):
        return self.project(x)


class Typed(nn.Module):
    def __init__(self, parts: list[nn.Module] | None = None, kind: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.project = nn.Linear(2, 2)
        self.parts, self.kind = nn.ModuleList(parts or []), kind

    def forward(self, x, t):
        return self.project(x)


class Resumable(ResumableModule):
    """A module that is no diffusion model."""

    def __init__(self, width: int = 2, network: nn.Module | None = None):
        super().__init__()
        self.save_hyperparameters(ignore=["network"])
        self.width = width
        self.layer = network or nn.Linear(2, width)


def annotated(optimizer: Optimizer, factor: float = 0.5) -> LRScheduler:
    return ConstantLR(optimizer, factor)


def unannotated(optimizer):
    return ConstantLR(optimizer)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of one training step."""
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    module = DiffusionModule(small_mlp())
    trainer.fit(module, EightGaussians(batch_size=16, num_samples=64, num_validation=16))
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    return torch.load(path, weights_only=True)


@pytest.fixture
def changed(good, tmp_path, monkeypatch):
    """Write the checkpoint with other arguments, in an empty folder with a strange package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)

    def write(**arguments):
        checkpoint = {**good, "hyper_parameters": good["hyper_parameters"] | arguments}
        if not isinstance(arguments.get("network", {"init_args": None}), dict):
            checkpoint["state_dict"] = {}
        torch.save(checkpoint, "changed.ckpt")
        return "changed.ckpt"

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "strange"]:
        del sys.modules[name]


def touch(class_path, **arguments):
    return {"class_path": class_path, "init_args": arguments}


RUN = {"command": "touch ran"}
HOSTILE = {
    "os.system": {"optimizer": touch("os.system", **RUN)},
    "posix.system": {"optimizer": touch("posix.system", **RUN)},
    "as text": {"optimizer": "os.system"},
    "as YAML": {"optimizer": "{class_path: os.system, init_args: {command: touch ran}}"},
    "as escaped YAML": {"optimizer": '{"class\\x5fpath": os.system}'},
    "as a file": {"optimizer": "evil.yaml"},
    "by a dotted key": {"optimizer.class_path": "os.system"},
    "as keywords": {"optimizer": {"class_path": "os.system", "dict_kwargs": RUN}},
    "with another key": {"optimizer": touch("torch.optim.SGD", lr=0.1) | {"more": 1}},
    "popen": {"optimizer": touch("subprocess.Popen", args=["touch", "ran"])},
    "exec": {"optimizer": touch("builtins.exec", source="open('ran', 'w')")},
    "hub": {"optimizer": touch("torch.hub.load", repo_or_dir="strange", model="build")},
    "load": {"optimizer": touch("torch.load", f="changed.ckpt", weights_only=False)},
    "extension": {"optimizer": touch("torch.utils.cpp_extension.load", name="a", sources=[])},
    "through ours": {"optimizer": touch("lightning_vr.cli.entry_point.os.system", **RUN)},
    "through torch": {"optimizer": touch("torch.os.system", **RUN)},
    "through torch.optim": {"optimizer": touch("torch.optim.optimizer.functools.partial")},
    "a class method": {
        "network": touch("diffusers.UNet2DModel.from_pretrained", pretrained_model_name_or_path="a")
    },
    "a method": {"optimizer": "torch.optim.SGD.step"},
    "a module": {"optimizer": "torch.optim"},
    "another kind": {"optimizer": touch("torch.nn.Linear", in_features=1, out_features=1)},
    "another kind as text": {"optimizer": "torch.nn.ReLU"},
    "a schedule for a network": {"schedule": touch("torch.nn.ReLU")},
    "a function for a schedule": {"lr_scheduler": touch(f"{__name__}.unannotated")},
    "a function of another kind": {"optimizer": touch(f"{__name__}.annotated")},
    "a function within": {
        "lr_scheduler": touch("torch.optim.lr_scheduler.LambdaLR", lr_lambda="os.system")
    },
    "foreign": {"optimizer": touch("strange.Descent", lr=0.1)},
    "foreign as text": {"optimizer": "strange.Descent"},
    "foreign function": {"lr_scheduler": "strange.schedule"},
    "foreign network": {"network": touch("strange.Strange")},
    "foreign network as text": {"network": "strange.Strange"},
    "foreign slot": {"target": touch("strange.Strange")},
    "foreign submodule": {"network": touch("strange.deep.Strange")},
    "a name that only begins alike": {"network": touch("torch_strange.Strange")},
    "without a module": {"network": touch("Network")},
    "relative": {"network": touch("..strange.Strange")},
    "a number": {"network": {"class_path": 3}},
    "a graph": {"network": touch("torch.fx.GraphModule", root={}, graph=None)},
    "a script": {"network": touch("torch.jit.ScriptModule")},
    "a metric": {"network": touch("torchmetrics.image.fid.FrechetInceptionDistance")},
    "a file is emptied": {"network": touch(f"{__name__}.Untyped", inner=touch("io.FileIO"))},
    "inside": {
        "network": touch(
            f"{__name__}.Untyped", inner=touch("subprocess.Popen", args=["touch", "ran"])
        )
    },
    "deep inside": {
        "network": touch(f"{__name__}.Untyped", inner=[{"a": [touch("os.system", **RUN)]}])
    },
    "deep inside as text": {
        "network": touch(f"{__name__}.Untyped", inner=["{a: {class_path: os.system}}"])
    },
    "as a name inside": {"network": touch(f"{__name__}.Untyped", inner="strange.Strange")},
    "as a file inside": {"network": touch(f"{__name__}.Untyped", inner="evil.yaml")},
    "a name of the standard library": {
        "network": touch(f"{__name__}.Untyped", inner="antigravity.fly")
    },
    "in keywords": {
        "network": {
            "class_path": f"{__name__}.Untyped",
            "dict_kwargs": {"deep": touch("os.system", **RUN)},
        }
    },
    "in a list of modules": {
        "network": touch(f"{__name__}.Typed", parts=[touch("strange.Strange")])
    },
    "a class as a class": {"network": touch(f"{__name__}.Typed", kind="subprocess.Popen")},
    "a foreign class as a class": {"network": touch(f"{__name__}.Typed", kind="strange.Strange")},
    "a plain class of the process": {
        "network": touch(f"{__name__}.Untyped", inner=touch("pathlib.Path"))
    },
    "keys with dots inside": {
        "network": touch(f"{__name__}.Untyped", inner={"a.class_path": "os.system"})
    },
    "in settings without a class": {"sampler": {"solver": touch("os.system", **RUN)}},
    "another kind in settings": {"sampler": {"solver": touch("torch.nn.ReLU")}},
    "foreign in settings": {"sampler": {"solver": touch("strange.Strange")}},
    "as text in settings": {"sampler": {"solver": "evil.yaml"}},
    "deep in settings": {
        "sampler": {
            "solver": touch("lightning_vr.DiffusersSolver", scheduler=touch("os.system", **RUN))
        }
    },
    "arguments that are a list": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": []}},
    "module of another kind": {"_class_path": "torch.nn.Linear"},
    "module that is a function": {"_class_path": "os.system"},
    "foreign module": {"_class_path": "strange.StrangeModule"},
    "module without a name": {"_class_path": ["os", "system"]},
}


@pytest.mark.parametrize("arguments", HOSTILE.values(), ids=HOSTILE)
def test_what_a_checkpoint_names_is_neither_run_nor_imported(arguments, changed):
    Path("evil.yaml").write_text("{class_path: os.system, init_args: {command: touch ran}}")
    path = changed(**arguments)
    before = set(sys.modules)
    with pytest.raises(ValueError, match=r"changed\.ckpt") as refusal:
        DiffusionModule.load_from_checkpoint(path)
    assert "\n" not in str(refusal.value)
    assert ": " in str(refusal.value).partition("changed.ckpt")[2], "there is no fix"
    assert set(os.listdir()) == {"changed.ckpt", "evil.yaml", "strange"}
    imported = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not imported & {"strange", "antigravity", "torch_strange"}


def test_a_value_that_holds_itself_or_too_much_is_refused(changed):
    endless = []
    endless.append(endless)
    many = [0] * 10
    for _ in range(9):
        many = [many] * 10
    for inner in (endless, many, [*range(200_000)]):
        with pytest.raises(ValueError, match="at most 100000 values in 30 levels"):
            DiffusionModule.load_from_checkpoint(
                changed(network=touch(f"{__name__}.Untyped", inner=inner))
            )


def test_the_name_that_lightning_would_call_is_not_looked_at(changed):
    path = changed(_instantiator="os.system")
    assert type(DiffusionModule.load_from_checkpoint(path)) is DiffusionModule


def test_a_package_that_is_trusted_is_imported_and_built(changed):
    path = changed(optimizer=touch("strange.Descent", lr=0.5))
    with pytest.raises(ValueError, match=r'trust=\["strange"\].*--trust strange'):
        DiffusionModule.load_from_checkpoint(path)
    module = DiffusionModule.load_from_checkpoint(path, trust=["strange"])
    assert type(module.configure_optimizers()).__module__ == "strange"
    assert Path("imported").exists()


def test_a_module_of_a_trusted_package_is_built(changed):
    path = changed(_class_path="strange.StrangeModule")
    assert (
        type(DiffusionModule.load_from_checkpoint(path, trust=["strange"])).__name__
        == "StrangeModule"
    )


def test_a_plain_object_of_a_trusted_package_is_built_where_the_hint_is_open(changed):
    inside = touch(f"{__name__}.Untyped", inner=touch("strange.Plain"))
    module = DiffusionModule.load_from_checkpoint(
        changed(network=inside), strict=False, trust=["strange"]
    )
    assert type(module.network.inner).__name__ == "Plain"


def test_trust_does_not_make_an_optimizer_of_a_function(changed):
    for given in (touch("strange.build"), "strange.build", touch("strange.Strange")):
        with pytest.raises(ValueError, match="must be an Optimizer"):
            DiffusionModule.load_from_checkpoint(changed(optimizer=given), trust=["strange"])
    assert not Path("ran").exists()


def test_trust_in_one_text_is_refused(changed):
    with pytest.raises(ValueError, match=r"must be a list of packages, got 'strange'"):
        DiffusionModule.load_from_checkpoint(changed(), trust="strange")


def test_an_import_that_fails_is_named_as_such(changed):
    with pytest.raises(ValueError, match=r"can be imported, got diffusers\.nonesuch"):
        DiffusionModule.load_from_checkpoint(changed(network=touch("diffusers.nonesuch.Network")))


def test_what_the_process_has_imported_is_built(changed):
    parts = [touch("torch.nn.modules.linear.Linear", in_features=2, out_features=2)]
    network = touch(f"{__name__}.Typed", parts=parts, kind="torch.nn.GELU")
    module = DiffusionModule.load_from_checkpoint(changed(network=network), strict=False)
    assert isinstance(module.network.parts[0], nn.Linear)
    assert module.network.kind is nn.GELU

    inner = {"a": [touch(f"{__name__}.Untyped", inner="gelu, as in 1.5"), 1.5, "b"]}
    network = touch(f"{__name__}.Untyped", inner=inner)
    module = DiffusionModule.load_from_checkpoint(changed(network=network), strict=False)
    assert set(module.network.inner) == {"a"}


def test_short_names_mean_a_class_of_the_kind_wanted(changed):
    module = DiffusionModule.load_from_checkpoint(changed(schedule="VP", optimizer="Adagrad"))
    assert isinstance(module.schedule, VP)
    assert type(module.configure_optimizers()) is torch.optim.Adagrad


def test_settings_without_a_class_are_those_of_the_only_class_that_fits(changed):
    settings = {"solver": touch("DDIM", eta=0.5), "guidance_interval": [0.1, 2.0]}
    module = DiffusionModule.load_from_checkpoint(changed(sampler=settings))
    assert module.sampler == Sampler(DDIM(eta=0.5), guidance_interval=(0.1, 2.0))


def test_a_scheduler_of_a_solver_is_built(changed):
    scheduler = touch("diffusers.EDMEulerScheduler", sigma_max=70.0)
    settings = {"solver": touch("lightning_vr.DiffusersSolver", scheduler=scheduler)}
    module = DiffusionModule.load_from_checkpoint(changed(sampler=settings))
    assert module.sampler.solver.scheduler.config.sigma_max == 70.0


def test_a_function_that_says_what_it_returns_is_taken(changed, good):
    schedule = functools.partial(annotated, factor=0.25)
    described = touch(f"{__name__}.annotated", factor=0.25)
    module = DiffusionModule.load_from_checkpoint(changed(lr_scheduler=described))
    assert module.lr_scheduler.function.func is schedule.func
    assert module.lr_scheduler.function.keywords == schedule.keywords


def test_an_argument_that_is_given_is_not_looked_at(changed):
    path = changed(optimizer=touch("os.system", **RUN))
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    module = DiffusionModule.load_from_checkpoint(path, optimizer=optimizer)
    assert module.optimizer.function is optimizer
    assert not Path("ran").exists()


def resumable(**hyperparameters):
    weights = Resumable().state_dict()
    torch.save({"state_dict": weights, "hyper_parameters": hyperparameters}, "other.ckpt")
    return "other.ckpt"


def test_other_modules_are_loaded_as_safely(changed):
    assert Resumable.load_from_checkpoint(resumable(width=2)).width == 2
    for network in (touch("os.system", **RUN), touch("strange.Strange")):
        path = resumable(
            width=2,
            network=network,
            _class_path=f"{__name__}.Resumable",
            _instantiator="lightning.pytorch.cli.instantiate_module",
        )
        with pytest.raises(ValueError, match="`network`"):
            Resumable.load_from_checkpoint(path)
    assert not {"ran", "imported"} & set(os.listdir())


def test_a_data_module_is_not_built_from_a_checkpoint(changed):
    with pytest.raises(NotImplementedError, match="`EightGaussians` must be built by its"):
        EightGaussians.load_from_checkpoint(changed())


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_objects_that_run_code_when_read_are_refused(changed, good):
    torch.save({**good, "epoch": Payload()}, "pickled.ckpt")
    with pytest.raises(ValueError, match=r"holds posix\.system, an object that could run code"):
        DiffusionModule.load_from_checkpoint("pickled.ckpt")
    trainer = quiet_trainer(max_steps=2)
    with pytest.raises(Exception, match="Weights only load failed"):
        trainer.fit(DiffusionModule(small_mlp()), EightGaussians(), ckpt_path="pickled.ckpt")
    assert not Path("ran").exists()


def test_also_what_lightning_reads_is_read_without_objects(monkeypatch):
    module, asked = DiffusionModule(small_mlp()), []
    trainer = quiet_trainer(max_steps=2)

    def read(self, path, map_location, weights_only):
        asked.append(weights_only)
        raise EOFError

    monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", read)
    with pytest.raises(EOFError):
        trainer.fit(module, EightGaussians(), ckpt_path="http://nowhere/a.ckpt")
    assert asked == [True]


class Mine(ModelCheckpoint):
    """Takes what a checkpoint says of its files, as it does where the folder is the same."""

    def load_state_dict(self, state):
        super().load_state_dict(state | {"dirpath": self.dirpath})


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("place", ["{folder}/../precious", "{folder}/link", "memory://precious"])
def test_a_checkpoint_cannot_have_files_removed(place, good, tmp_path):
    precious, folder = tmp_path / "precious", tmp_path / "checkpoints"
    precious.write_text("thesis")
    folder.mkdir()
    (folder / "link").symlink_to(precious)
    saver = {"dirpath": str(folder), "save_top_k": 1}
    path = place.format(folder=folder)
    state = {"best_model_score": None, "best_model_path": path, "last_model_path": path}
    checkpoint = good | {"callbacks": {Mine(**saver).state_key: state}}
    torch.save(checkpoint, tmp_path / "evil.ckpt")

    trainer = quiet_trainer(
        Mine(**saver), enable_checkpointing=True, max_steps=8, limit_val_batches=0
    )
    data = EightGaussians(batch_size=16, num_samples=64, num_validation=16)
    with pytest.warns(UserWarning, match="is not removed: this run has not written it"):
        trainer.fit(DiffusionModule(small_mlp()), data, ckpt_path=tmp_path / "evil.ckpt")
    assert precious.read_text() == "thesis"
    assert list(folder.glob("*.ckpt"))


@pytest.mark.parametrize(("name", "version"), [("../x", None), ("a", "../../x"), ("a", "{}/x")])
def test_a_run_of_python_stays_in_its_folder(name, version, tmp_path):
    version = version and version.format(tmp_path)
    trainer = quiet_trainer(logger=CSVLogger(tmp_path / "runs", name, version), max_steps=1)
    with pytest.raises(ValueError, match="`name` and `version` of CSVLogger must stay within"):
        trainer.fit(DiffusionModule(small_mlp()), EightGaussians(num_samples=256))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
