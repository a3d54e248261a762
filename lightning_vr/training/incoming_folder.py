"""A folder of diffusers as the settings of a module: its scheduler decides what is trained on.

The folder may be a stock pipeline's or one of ``export``. Its network keeps its settings and
weights. A stock scheduler decides schedule and prediction: ``EDMEulerScheduler`` is EDM's schedule
and preconditioning with diffusers' time embedding, every other one is a ``DiffusersSchedule``. What
``export`` wrote says itself what it was trained for, so that a continuous schedule comes back as
such. A DiT says how many classes it embeds; a variance that the scheduler takes from the network is
learned further. Nothing is downloaded, no code of the folder is run and no pickle is read: classes
are those of diffusers and the schedules of this package, weights are safetensors.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_vr.core.devices import without_compiler
from lightning_vr.process.diffusers_network import Pretrained, load_pretrained
from lightning_vr.process.diffusers_schedule import DiffusersSchedule
from lightning_vr.process.schedules import EDM, VE, VP, Cosine, RectifiedFlow, Schedule
from lightning_vr.training.adapters import load_base, source_folder

TRAINED_FOR = "lightning_vr.json"
"""The file in the folder of a pipeline that says what its network was trained for."""

_NETWORKS = ("unet", "transformer")
_AUTOENCODER = "vae"
_ARGUMENTS = ("prediction", "sigma_data", "num_classes", "label_dropout")
_LEARNED = {"weight": 0.001, "levels": None}
"""Settings of ``LearnedVariance`` where a folder has none."""

_SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (EDM, VE, VP, Cosine, RectifiedFlow, DiffusersSchedule)
}


@dataclass(frozen=True)
class IncomingFolder:
    """What a folder says of a module.

    Attributes:
        network_folder: Where the network is.
        network: Its class and arguments.
        schedule: The schedule's class and arguments.
        others: Further arguments of the module.
        learned: Its argument ``variance``, as settings, if the network's variance is learned.
        autoencoder: Settings of an ``AutoencoderFolder``, or None if there is none.
    """

    network_folder: Path
    network: dict[str, Any]
    schedule: dict[str, Any]
    others: dict[str, Any]
    learned: dict[str, Any]
    autoencoder: dict[str, Any] | None

    @classmethod
    def read(cls, folder: str | Path) -> "IncomingFolder":
        """Read a folder with a network and a scheduler.

        Raises:
            ValueError: If it lacks one of them, or if its scheduler is for another objective.
        """
        import diffusers  # which takes seconds

        path = Path(folder).expanduser()
        found = [path / name for name in _NETWORKS if (path / name / "config.json").is_file()]
        config, own = path / "scheduler" / "scheduler_config.json", path / TRAINED_FOR
        if len(found) != 1 or not config.is_file():
            raise ValueError(
                f"`pretrained` must be a folder that diffusers wrote, with a `scheduler` and "
                f"either a `unet` or a `transformer`, got {path}: name the folder of a pipeline, "
                f"or configure network and schedule."
            )
        network = _described(_json(found[0] / "config.json"), diffusers.ModelMixin, found[0])
        scheduler = _described(_json(config), diffusers.SchedulerMixin, config.parent)
        if own.is_file():
            saved = _json(own)
            schedule, others = _own_objective(saved, scheduler, own)
            learned = _own_variance(saved.get("variance"), own)
        else:
            schedule, others = _objective(scheduler)
            others |= _classes(network)
            learned = _variance(network, scheduler)
        has_autoencoder = (path / _AUTOENCODER / "config.json").is_file()
        autoencoder = {"path": str(path), "subfolder": _AUTOENCODER} if has_autoencoder else None
        return cls(found[0], network, schedule, others, learned, autoencoder)

    def settings(self, *, frozen: bool) -> dict[str, Any]:
        """Return the arguments of a ``DiffusionModule`` as a configuration.

        Args:
            frozen: Whether the network keeps its weights, so that checkpoints may leave them out
                and the network comes from this folder each time.
        """
        path = {"path": str(self.network_folder.resolve())}
        loaded = {"class_path": _path(Pretrained), "init_args": path}
        network = loaded if frozen else self.network
        return {"network": network, "schedule": self.schedule, **self.others, **self.learned}

    def arguments(self) -> dict[str, Any]:
        """Return the same with network, its weights loaded, and schedule as objects."""
        return {"network": self.load_network(), **self.objective, **self.learned}

    @property
    def objective(self) -> dict[str, Any]:
        """The schedule as an object, and what the network predicts of it."""
        return {"schedule": _rebuilt(self.schedule), **self.others}

    def load_weights(self, network: nn.Module) -> None:
        """Load the network's weights, beneath its adapter if it has one.

        Raises:
            ValueError: If there are none, or if they are another network's.
        """
        plain = without_compiler(network)
        if source_folder(plain) == str(self.network_folder.resolve()):
            return
        with self._named_errors():
            load_base(plain, self.load_network().state_dict())

    def load_network(self, dtype: str = "float32") -> nn.Module:
        """Return the network with its weights in a dtype.

        Raises:
            ValueError: If they are not all there, or others are.
        """
        import diffusers

        kind = getattr(diffusers, self.network["class_path"].rpartition(".")[2])
        with self._named_errors():
            return load_pretrained(kind, self.network_folder, dtype, None)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever diffusers meets in a damaged folder
            reason = " ".join(f"{error}".split())[:200]
            raise ValueError(
                f"`pretrained` must have the weights of the network as safetensors in "
                f"{self.network_folder} ({reason}): save it by `save_pretrained`, and leave the "
                f"settings of `network` out."
            ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        found = str(error)
    if not isinstance(found, dict):
        raise ValueError(
            f"`pretrained` must be a folder that diffusers wrote, but {path} holds no settings: "
            f"save it again."
        )
    return found


def _described(config: dict[str, Any], base: type, path: Path) -> dict[str, Any]:
    """Return a class of diffusers and its arguments.

    Raises:
        ValueError: If it is none of diffusers, or of another kind.
    """
    import diffusers

    name = str(config.get("_class_name"))
    kind: Any = getattr(diffusers, name, None) if name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise ValueError(
            f"`pretrained` must be a folder of classes of diffusers, but {path} holds a {name}: "
            f"configure network and schedule."
        )
    known = inspect.signature(kind).parameters
    arguments = {key: value for key, value in config.items() if key in known}
    return {"class_path": f"diffusers.{name}", "init_args": arguments}


def _objective(scheduler: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schedule that a scheduler decides, and the arguments that go with it."""
    given = scheduler["init_args"]
    if scheduler["class_path"] != "diffusers.EDMEulerScheduler":
        live = DiffusersSchedule(_rebuilt(scheduler))
        return _table(scheduler), {"prediction": live.prediction}
    if given.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(
            f"`prediction_type` of an EDMEulerScheduler must be 'epsilon' to train on, as others "
            f"turn the sign of the network's output, got {given['prediction_type']!r}: configure "
            f"network and schedule."
        )
    ends = {name: given[name] for name in ("sigma_min", "sigma_max") if name in given}
    schedule = {"class_path": _path(EDM), "init_args": ends | {"embedding_scale": 1.0}}
    return schedule, {"prediction": "edm", "sigma_data": given.get("sigma_data", 0.5)}


def _classes(network: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for the classes of a DiT, which has a label for no class besides."""
    if network["class_path"] != "diffusers.DiTTransformer2DModel":
        return {}
    # the fraction that it is published with (Peebles and Xie 2023, 2212.09748)
    count = network["init_args"].get("num_embeds_ada_norm", 1000)
    return {"num_classes": count, "label_dropout": 0.1}


def _variance(network: dict[str, Any], scheduler: dict[str, Any]) -> dict[str, Any]:
    """Return the argument ``variance`` where a scheduler takes it from the network."""
    channels, out = (network["init_args"].get(name) for name in ("in_channels", "out_channels"))
    is_learned = scheduler["init_args"].get("variance_type") == "learned_range"
    return {"variance": _LEARNED} if is_learned and channels and out == 2 * channels else {}


def _own_objective(
    saved: dict[str, Any], scheduler: dict[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what ``export`` has written of the schedule, and the arguments that go with it."""
    others = {name: saved.get(name) for name in _ARGUMENTS if saved.get(name) is not None}
    described = saved.get("schedule") or {}
    kind = _SCHEDULES.get(str(described.get("class_path")).rpartition(".")[2])
    if kind is DiffusersSchedule:
        return _table(scheduler), others
    if kind is None:
        raise ValueError(
            f"`pretrained` must be a folder that was exported with a schedule of this package, but "
            f"{path} names {described.get('class_path')}: configure network and schedule."
        )
    return {"class_path": _path(kind), "init_args": described["init_args"]}, others


def _own_variance(saved: Any, path: Path) -> dict[str, Any]:
    """Return the argument ``variance`` as ``export`` has written it."""
    if saved is None:
        return {}
    if isinstance(saved, dict) and saved.keys() <= _LEARNED.keys():
        return {"variance": saved}
    raise ValueError(
        f"`pretrained` must be a folder that was exported with a LearnedVariance, but {path} says "
        f"{saved!r:.80} of `variance`: configure network and schedule."
    )


def _table(scheduler: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": _path(DiffusersSchedule), "init_args": {"scheduler": scheduler}}


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _rebuilt(described: dict[str, Any]) -> Any:
    """Return an object of settings from JSON; a parser takes seconds for a table of betas."""
    import diffusers

    module, _, name = described["class_path"].rpartition(".")
    kind = getattr(diffusers, name) if module == "diffusers" else _SCHEDULES[name]
    arguments = described["init_args"]
    nested = {key: _rebuilt(x) for key, x in arguments.items() if key == "scheduler"}
    return kind(**(arguments | nested))
