"""LightningCLI, where what is configured wins over what a checkpoint says."""

import sys
import warnings
from argparse import SUPPRESS
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

# a short class name resolves once its class is imported
import lightning_vr.auditing
import lightning_vr.callbacks
import lightning_vr.data
import lightning_vr.estimators
import lightning_vr.lifecycle
import lightning_vr.metrics
import lightning_vr.process
import lightning_vr.teachers.distribution_matching
import lightning_vr.teachers.score_distillation  # noqa: F401
from lightning_vr.cli.checkpoint_path import checkpoint_path
from lightning_vr.cli.checkpoint_settings import check_changes, model_settings, saved_seed
from lightning_vr.cli.class_names import monitored_plateau
from lightning_vr.cli.comments import comments_as_text
from lightning_vr.cli.nested_values import values_as_written
from lightning_vr.cli.network_mapping import NetworkMappingParser
from lightning_vr.cli.optimization_classes import check_optimization_classes
from lightning_vr.cli.pretrained_settings import check_pretrained
from lightning_vr.cli.run_names import check_run_names
from lightning_vr.cli.save_run_config import SaveRunConfig
from lightning_vr.cli.setting_values import check_values
from lightning_vr.cli.trainer_checks import check_processes, check_trainer_settings
from lightning_vr.cli.vr_trainer import VRTrainer
from lightning_vr.cli.yaml_files import check_yaml_files
from lightning_vr.lifecycle.checkpoint_contents import check_training_state, check_version
from lightning_vr.lifecycle.checkpoints import check_weights, read_checkpoint
from lightning_vr.lifecycle.configuration import imported
from lightning_vr.lifecycle.quiet_trainer import quiet_trainer
from lightning_vr.lifecycle.rebuilding import check_size
from lightning_vr.lifecycle.step_progress_bar import use_step_progress_bar
from lightning_vr.lifecycle.trust import Trust
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.incoming_folder import IncomingFolder
from lightning_vr.training.latents import LatentDiffusionModule
from lightning_vr.training.module import DiffusionModule

_LOADERS = {
    "fit": "train_dataloader",
    "audit": "train_dataloader",
    "cache": "train_dataloader",
    "error_budget": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
}
_LOGGER = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": ""}}


class VRCLI(LightningCLI):
    """Lightning's command line with our modules as the model and without its pitfalls.

    Args:
        model_class: The class that ``--model`` names a subclass of; where there are only arguments
            and this is ``EstimatorModule``, it is ``DiffusionModule`` itself.
        datamodule_class: The class that ``--data`` names a subclass of.
        **kwargs: As ``LightningCLI`` takes them.
    """

    def __init__(
        self,
        model_class: type[LightningModule] = EstimatorModule,
        datamodule_class: type[LightningDataModule] = LightningDataModule,
        **kwargs: Any,
    ) -> None:
        self._checkpoint: dict[str, Any] | None = None
        self._pretrained: IncomingFolder | None = None
        args = kwargs.get("args")
        self._arguments = sys.argv[1:] if args is None else args
        defaults: dict[str, Any] = {
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "auto_configure_optimizers": False,
            "seed_everything_default": 0,
            "save_config_callback": SaveRunConfig,
            "trainer_class": VRTrainer,
            "parser_class": NetworkMappingParser,
            "trainer_defaults": {"logger": _LOGGER},
            "parser_kwargs": {
                "prog": "lightning-vr",
                "description": "Variance-reduced diffusion training. A wrong setting is one line; "
                "LIGHTNING_VR_TRACEBACK=1 shows where it was raised.",
                "version": version("lightning-vr"),
                "exit_on_error": False,
                "allow_abbrev": False,
            },
        }
        check_yaml_files()
        super().__init__(model_class, datamodule_class, **(defaults | kwargs))

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands and which of their arguments the command line sets itself."""
        own = ("audit", "cache", "error_budget", "export")
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in own}}

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        # filling one takes a tenth of a second: fill only that of the subcommand, if known
        first = next(iter(self._arguments), None)
        if first in self.subcommands() and first != subcommand:
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for name in {"ckpt_path", "weights_only"} - set(parser.get_defaults().keys()):
            # nothing is done with them, but the config.yaml of a run has them
            parser.add_argument(f"--{name}", default=None, help=SUPPRESS)
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data; a checkpoint may stand in for the last two."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": x for name, x in self.trainer_defaults.items()})
        if self._model_class is EstimatorModule:
            group = parser.add_argument_group("Trains a diffusion model, or by a frozen one")
            bases = (DiffusionModule, EstimatorModule)  # the first where only arguments are given
            group.add_subclass_arguments(bases, "model", as_group=False, fail_untyped=False)
        else:
            parser.add_lightning_class_args(self._model_class, "model", True, required=False)
        parser.add_lightning_class_args(self._datamodule_class, "data", True, required=False)
        parser.add_argument(
            "--trust",
            nargs="*",
            default=[],
            help="Packages of your own or of others whose classes may be built from --ckpt_path.",
        )
        parser.add_argument(
            "--pretrained",
            type=str | None,
            help="A folder of diffusers with the network to begin with, whose scheduler decides "
            "schedule and prediction; what is configured counts before it.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; where no module is configured, a checkpoint's hyperparameters are the defaults."""
        if not hasattr(self, "_subcommand_parsers"):
            self._parse(args)
            return
        missing: Exception | None = None
        try:
            self._parse(args)
        except ArgumentError as error:
            if not self._may_name_weights():
                raise  # nothing else would build a module
            missing = error
            self._parse_without_network(args, error)
        path = checkpoint_path(self._settings)
        # checkpoints of an adapter lack the network that it adapts
        if self._settings.pretrained and (path is None or self._has_adapter):
            self._begin_with_pretrained(args)
            missing = None
            if path is None:
                return
        if missing is None and self._settings.model is None:
            missing = ValueError(
                "`model` must be configured: give a network, as in --model.network ResidualMLP, or "
                "a configuration file, the --ckpt_path of a run, or a --pretrained folder."
            )
        if path is None:
            if missing is not None:
                raise missing
            return
        self._take_from_checkpoint(args, path, has_model=missing is None)
        self._settings.ckpt_path = path

    def _take_from_checkpoint(self, args: ArgsType, path: Any, *, has_model: bool) -> None:
        """Read the checkpoint, and parse with what it says where that is not configured."""
        self._checkpoint = read_checkpoint(path)
        check_version(self._checkpoint, path)
        if self.config.subcommand == "fit":
            check_training_state(self._checkpoint, path)
        defaults: dict[str, Any] = {}
        if not has_model:
            trust = Trust(path, self._settings.trust)
            defaults["model"] = model_settings(self._checkpoint, self._model_class, trust)
        seed = saved_seed(self._checkpoint)
        if self.config.subcommand == "fit" and seed is not None:
            defaults["seed_everything"] = seed
        for name, value in defaults.items():
            self._set_default(name, value)
        if defaults:
            self._parse(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, whose progress bar counts steps unless one is configured."""
        configured = self._get(self.config_init, "trainer", default={}).get("callbacks")
        callbacks = configured if isinstance(configured, list) else [configured]
        # asked before there is a trainer, which adds its own callbacks to the list
        has_progress_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        measures = self.subcommand in ("audit", "error_budget")
        with quiet_trainer() if measures else nullcontext():
            trainer = super().instantiate_trainer(**kwargs)
        check_processes(trainer)
        if not has_progress_bar:
            use_step_progress_bar(trainer)
        return trainer

    def before_instantiate_classes(self) -> None:
        """Check settings that Lightning would accept and not follow."""
        if hasattr(self, "_subcommand_parsers"):
            check_values(self._settings, {"trainer": self.trainer_class})
            check_trainer_settings(self._settings.trainer, self.config.subcommand)
            check_run_names(self._settings.trainer)
            check_optimization_classes(self._settings.model)
            if "weights_only" in self._settings and self._settings.weights_only is None:
                # for a remote file Lightning would read any object
                self._settings.weights_only = True
            if self._checkpoint:
                model = self._settings.model
                trust = Trust(self._settings.ckpt_path, self._settings.trust)
                arguments = model.init_args.as_dict()
                check_size(imported(model.class_path), arguments, self._checkpoint, trust)

    def after_instantiate_classes(self) -> None:
        """Check what would fail later with a traceback."""
        loader = _LOADERS.get(str(self.subcommand))
        if loader and self.datamodule is None and not is_overridden(loader, self.model):
            raise ValueError(
                f"`data` must be configured: name a data module, as in `{self.subcommand} --data "
                f"Digits`."
            )
        is_built = not is_overridden("configure_model", self.model)
        if self._checkpoint and self.model.strict_loading and is_built:
            if isinstance(self.model, DiffusionModule):
                self.model.complete_checkpoint(self._checkpoint)
            check_weights(self.model, self._checkpoint, self._settings.ckpt_path)
        if self._pretrained is not None:
            self._pretrained.load_weights(self.model.network)
        # each run has its own folder; without training only a checkpoint's weights matter
        messages = [
            "The dirpath has changed from",
            "`isinstance.treespec, LeafSpec.` is deprecated",
        ]
        if self.subcommand != "fit":
            messages += ["callbacks used to create the checkpoint", "the WeightAveraging callback"]
        for message in messages:
            warnings.filterwarnings("ignore", f".*{message}")

    @property
    def _settings(self) -> Namespace:
        settings = self.config[self.config.subcommand]
        assert isinstance(settings, Namespace)
        return settings

    @comments_as_text()
    @monitored_plateau()
    def _parse(self, args: ArgsType) -> None:
        if isinstance(args, (dict, Namespace)):
            self.config = self.parser.parse_object(args)
            return
        with values_as_written():
            self.config = self.parser.parse_args(self._arguments)

    def _may_name_weights(self) -> bool:
        """Return whether settings may hold ``ckpt_path`` or ``pretrained``, also in a file."""
        given = self._arguments
        if not isinstance(given, list) or self.parser.default_env:
            return True
        return any(
            each.startswith(("-c", "--config", "--ckpt_path", "--pretrained")) for each in given
        )

    def _parse_without_network(self, args: ArgsType, error: ArgumentError) -> None:
        placeholder = {"network": {"class_path": "torch.nn.Identity"}}
        self._set_default("model", self._module_of(placeholder, autoencoder={"path": "."}))
        try:
            self._parse(args)
        except ArgumentError:
            raise error from None

    def _begin_with_pretrained(self, args: ArgsType) -> None:
        """Parse with the network of a folder as the default."""
        self._pretrained = found = IncomingFolder.read(self._settings.pretrained)
        arguments = found.settings(frozen=self._has_adapter)
        self._set_default("model", self._module_of(arguments, found.autoencoder))
        self._parse(args)
        check_pretrained(self._settings, found)

    @property
    def _has_adapter(self) -> bool:
        model = self._settings.model
        return model is not None and model.init_args.get("adapter") is not None

    def _module_of(
        self, arguments: dict[str, Any], autoencoder: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return settings of a module, of one of latents where there is an autoencoder."""
        kind: Any = self._model_class
        kind = DiffusionModule if kind is EstimatorModule else kind
        if autoencoder and isinstance(kind, type) and issubclass(LatentDiffusionModule, kind):
            kind, arguments = LatentDiffusionModule, arguments | {"autoencoder": autoencoder}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}

    def _set_default(self, name: str, value: Any) -> None:
        for parser in self._subcommand_parsers.values():
            if name in parser.get_defaults():
                parser.set_defaults({name: value})

    def _parse_ckpt_path(self) -> None:
        # here Lightning would let a checkpoint's hyperparameters override the settings
        if self._checkpoint is not None:
            is_fit = self.config.subcommand == "fit"
            check_changes(self._settings, self._checkpoint, is_fit=is_fit)
