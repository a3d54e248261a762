"""Bad configurations, as people write them: one line names the argument and the fix."""

import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import NETWORK, POINTS, SHORT
from torch import nn

from lightning_vr import ResidualMLP
from lightning_vr.cli import close_names, main

TESTS = str(Path(__file__).parents[1])


class Bad(NamedTuple):
    """One bad configuration.

    Attributes:
        flags: What the user types after the subcommand; of a file ``bad.yaml`` nothing.
        argument: The argument as the user wrote it.
        fix: Words of the fix.
        yaml: The file ``bad.yaml``, given by ``--config``.
        command: The subcommand.
        network: What is configured as the network, unless the flags do.
        data: What is configured as the data, unless the flags do.
        again: Whether the lines of the package that find it find other cases too.
    """

    flags: str
    argument: str
    fix: str
    yaml: str | None = None
    command: str = "fit"
    network: list[str] = NETWORK
    data: list[str] = POINTS
    again: bool = False


class Normalised(ResidualMLP):
    """A network that couples the draws of a batch."""

    def __init__(self):
        super().__init__(width=16, depth=1)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, t, class_labels=None):
        return super().forward(self.norm(x), t)


def fit(flags, argument, fix, **kwargs):
    return Bad(flags, argument, fix, **kwargs)


def own(flags, argument, fix):
    """Data of the flags' choice, in place of points."""
    return Bad(flags, argument, fix, data=[])


def file(yaml, argument, fix, flags="", **kwargs):
    return Bad(flags, argument, fix, yaml=yaml, **kwargs)


def callback(settings, argument, fix, flags=""):
    return file(f"trainer: {{callbacks: [{settings}]}}", argument, fix, flags)


def unet(change, argument, fix, module=""):
    """The smallest U-Net for the digits, with a change."""
    blocks = "down_block_types: [DownBlock2D], up_block_types: [UpBlock2D]"
    sizes = "sample_size: 8, in_channels: 1, out_channels: 1, block_out_channels: [8]"
    settings = f"{sizes}, layers_per_block: 1, norm_num_groups: 4, {blocks}, {change}"
    network = dict(re.findall(r"(\w+): (\[.*?\]|[^,]+)", settings))
    arguments = ", ".join(f"{name}: {value}" for name, value in network.items())
    yaml = (
        f"model:\n  class_path: DiffusionModule\n  init_args:\n    network:\n"
        f"      class_path: diffusers.UNet2DModel\n      init_args: {{{arguments}}}\n    {module}\n"
    )
    return file(yaml, argument, fix, network=[], data=["--data=Digits"])


def audit(candidates, argument, fix):
    return Bad("--candidates=bad.yaml", argument, fix, yaml=candidates, command="audit")


def again(bad):
    """A case for `-m slow`."""
    return bad._replace(again=True)


CARV = "--model.draws=CARV --model.draws."
STF = "--model.target=STF --model.target."
SCHEDULER = "--model.lr_scheduler="
OF_SCHEDULER = "--model.lr_scheduler."
ONE_CYCLE = f"{SCHEDULER}OneCycleLR {OF_SCHEDULER}max_lr=0.1 {OF_SCHEDULER}"
PLATEAU = f"{SCHEDULER}ReduceLROnPlateau {OF_SCHEDULER}monitor="
TAYLOR = "--model.control_variate=TaylorCV --model.control_variate."
ADAM = "--model.optimizer=AdamW --model.optimizer."
IMAGES = "--data=ImageFolder --data.size=8 --data.path="
NORMALISED = ["--model.network", f"{__name__}.Normalised"]

MODEL = [
    fit("--model.network.width=wide", "model.network.width", "int"),
    fit("--model.network.width=3", "`width`", "even"),
    fit("--model.network.width=10000000", "ResidualMLP", "use smaller sizes"),
    again(fit("--model.network.num_class_embeds=0", "`num_class_embeds`", "at least 1")),
    fit("--model.network.dimension=3", "`network`", "shape of the data"),
    again(fit("--model.network=ResidualMlp", "model.network", "use ResidualMLP")),
    fit("--model.network=diffusers.Unet2DModel", "model.network", "use diffusers.UNet2DModel"),
    again(fit("--model.network=Nonesuch", "`model.network`", "give the full path")),
    fit("--model.network=nope.Nope", "`model.network`", "correct the path"),
    fit("--model.network=[1]", "`model.network` must be a class", "give the full path"),
    fit("--model.network=lightning_vr.posterior_mean", "`model.network`", "give the full path"),
    again(fit("--model.network.widht=16", "`model.network.widht`", "use width")),
    again(fit("--model.network=torch.nn.Linear", "in_features", "set model.network.in_features")),
    fit("--model.network=torch.nn.ReLU", "`network`", "(x, t)"),
    fit("--model.sigma_data=0", "`sigma_data`", "positive"),
    fit("--model.prediction=noise", "model.prediction", "'epsilon'"),
    fit("--model.lr=0.1", "`model.lr`", "optimizer"),
    again(fit("--model=DiffusionModul", "model", "use DiffusionModule")),
    again(fit("--model.schedule=DDPM", "model.schedule", "use EDM, VE, VP")),
    fit("--model.schedule=Schedule", "`model.schedule` must be a class", "use EDM, VE, VP"),
    fit("--model.schedule=diffusers.DDPMScheduler", "`prediction`", "to 'epsilon'"),
    fit("--model.schedule=diffusers.EDMEulerScheduler", "`scheduler`", "use EDM()"),
    fit(
        "--model.schedule=diffusers.FlowMatchEulerDiscreteScheduler --model.prediction=velocity "
        "--model.timesteps=Uniform",
        "`timesteps`",
        "Shifted(",
    ),
    again(fit("--model.schedule=EDM --model.schedule.sigma_min=90", "`sigma_min`", "< sigma_max")),
    file(
        "model: {init_args: {schedule: {class_path: VE, init_args: {sigma_max: .inf}}}}",
        "`sigma_max`",
        "< inf",
    ),
    again(fit("--model.timesteps=LogUniform", "low", "set model.timesteps.low")),
    fit("--model.schedule=RectifiedFlow --model.timesteps=LogNormal", "`timesteps`", "Uniform("),
    file(
        "model: {init_args: {timesteps: {class_path: LogNormal, init_args: {mean: .nan}}}}",
        "`model.timesteps.mean`",
        "must be a number",
    ),
    again(fit("--model.num_classes=8", "`network`", "set num_class_embeds to 9")),
    fit(
        "--model.num_classes=8 --model.network.num_class_embeds=8",
        "num_class_embeds=8",
        "set num_class_embeds to 9",
    ),
    again(
        fit(
            "--model.num_classes=4 --model.network.num_class_embeds=5",
            "`num_classes`",
            "set `num_classes` to 8",
        )
    ),
    fit(
        "--model.num_classes=4 --model.network.num_class_embeds=9",
        "`group`",
        "`num_classes` to 8",
    ),
    fit("--model.label_dropout=0.1", "`label_dropout`", "set `num_classes`"),
    fit("--model.sampler.guidance=2", "`guidance`", "set `num_classes`"),
    fit(
        "--model.num_classes=8 --model.network.num_class_embeds=9 --model.sampler.guidance=2",
        "`guidance`",
        "`label_dropout` of 0.1",
    ),
    fit(
        "--model.schedule=VP --model.sampler.noise_level_max=1e9",
        "`noise_level_max`",
        "widen the schedule",
    ),
    fit("--model.network.width=null", "`model.network.width`", "got null: give it one"),
    again(fit("--model.network.depth=1.5", "`model.network.depth`", "whole number")),
    again(fit("--model.network=transformers.Nope", "`model.network`", "install it")),
    fit("--model.network=", "`model.network` must be a class", "got nothing"),
    again(fit("--model.prediction=null", "`model.prediction`", "got null")),
    again(fit("--model.sigma_data=.nan", "`model.sigma_data`", "must be a number")),
    again(fit("--model.on_nonfinite=ignore", "`model.on_nonfinite`", "'raise' or 'skip'")),
    fit("--model.sampler.steps=0", "`steps`", "use 2 or more"),
    again(fit("--model.batch_size=3", "`model.batch_size`", "use network")),
    fit("--model.=3", "`model`", "`class_path`"),
    file("model: {class_path: null}", "`model` must name a class", "`class_path`"),
    file("model: {init_args: [1]}", "`init_args` of `model`", "write `name: value`"),
    again(
        file(
            "model: {init_args: {network: {init_args: {width: null}}}}",
            "`model.network.width`",
            "got null: give it one",
        )
    ),
    again(unet("in_channels: 3", "`network`", "shape of the data")),
    unet("out_channels: 3", "`network`", "as many output as input channels"),
    unet("norm_num_groups: 3", "UNet2DModel", "divisible by num_groups"),
    unet("num_class_embeds: 11", "`num_classes`", "set `num_classes` to 10"),
    again(
        unet("sample_size: 8", "`network`", "set num_class_embeds to 11", module="num_classes: 10")
    ),
]

ESTIMATORS = [
    fit(f"{CARV}resamples=3 --model.draws.antithetic=true", "`resamples`", "use 4"),
    fit(f"{CARV}resamples=1000000000", "`resamples`", "use a number such as 4"),
    again(fit(f"{CARV}max_resamples=1000000000", "`max_resamples`", "use a number such as 4")),
    again(fit(f"{CARV}resamples=null", "`model.draws.resamples`", "got null: give it one")),
    again(fit(f"{CARV}antithetic=[1]", "`model.draws.antithetic`", "tuple with 2 elements")),
    again(fit(f"{CARV}scope=all", "`model.draws.scope`", "'nested'")),
    fit(f"{STF}references=1.5", "`model.target.references`", "'batch' or 'all'"),
    again(fit(f"{CARV}resamples=many", "model.draws.resamples", "int or 'auto'")),
    fit(f"{CARV}resamples=2", "`resamples`", "use group normalisation", network=NORMALISED),
    fit(
        f"{CARV}proposal=TableProposal --model.draws.proposal.probabilities=[0,1]",
        "`proposal`",
        "mix in some",
    ),
    again(fit("--model.draws.resamples=2", "`model.draws` must be a class", "use IID or CARV")),
    again(fit("--model.draws=STF", "`model.draws`", "use IID or CARV")),
    again(fit("--model.target=lightning_vr.CARV", "`model.target`", "use DSM or STF")),
    again(
        fit(f"{TAYLOR}gate=[0]", "`model.control_variate.gate`", "tuple with 2 elements, 'auto'")
    ),
    fit(f"{STF}references=513", "`references`", "use fewer, or 'all'"),
    again(fit(f"{STF}reference=16", "`model.target.reference`", "use references")),
    fit(f"{TAYLOR}order=1", "`control_variate`", "use group normalisation", network=NORMALISED),
    file(
        "model: {init_args: {control_variate: {class_path: TaylorCV, "
        "init_args: {coefficient: .inf}}}}",
        "`coefficient`",
        "finite",
    ),
]

OPTIMIZATION = [
    again(fit("--model.optimizer=Adamw", "model.optimizer", "use AdamW")),
    again(fit("--model.optimizer=nope.Nope", "`model.optimizer`", "correct the path")),
    again(fit("--model.optimizer=torch.nn.Linear", "`model.optimizer`", "give the full path")),
    again(fit(f"{ADAM}betas=3", "`model.optimizer.betas`", "use a list")),
    fit(f"{ADAM}lr=[1]", "`model.optimizer.lr` must be float", "use a decimal number"),
    fit(f"{ADAM}lr=-1", "model.optimizer", "0 or more"),
    again(fit(f"{ADAM}lr=null", "`model.optimizer.lr`", "got null: give it one")),
    again(fit(f"{ADAM}lr=.nan", "`model.optimizer.lr` must be a number", "use one")),
    fit(f"{ADAM}lr=1e300", "`lr` of the optimizer", "use a smaller one"),
    again(fit(f"{ADAM}eps=1e300", "`eps` of the optimizer", "use a smaller one")),
    again(fit(f"{ADAM}lr=", "`model.optimizer.lr`", "got nothing: use a decimal number")),
    again(fit(f"{ADAM}betas=[null,1]", "`model.optimizer.betas`", "use a decimal number")),
    again(fit(f"{ADAM}betas=[0.9]", "`model.optimizer.betas`", "use a list")),
    fit(f"{ADAM}params=[]", "`model.optimizer.params`", "use lr, betas"),
    fit(f"{ADAM}capturable=true", "`model.optimizer`", "change its settings"),
    fit("--model.optimizer=SparseAdam", "`model.optimizer`", "consider Adam"),
    fit("--model.optimizer=Muon", "`model.optimizer`", "use another, such as AdamW"),
    fit("--model.optimizer=os.system", "`model.optimizer` must be a class", "full path"),
    fit("--model.optimizer=torch.optim.AdamW(lr=1)", "`model.optimizer`", "give the full path"),
    again(
        fit("--model.optimizer=torch.optim.Optimizer", "`model.optimizer`", "set model.optimizer")
    ),
    fit(f"{ONE_CYCLE}total_steps=1", "`lr_scheduler.total_steps`", "set it to 2"),
    fit(f"{ONE_CYCLE}three_phase=true", "OneCycleLR", "total_steps"),
    again(
        fit(
            f"{ONE_CYCLE}total_steps=9 --trainer.max_steps=-1 --trainer.max_epochs=-1",
            "`lr_scheduler.total_steps`",
            "set `max_steps`",
        )
    ),
    again(fit(f"{PLATEAU}loss", "`monitor` of ReduceLROnPlateau", "'loss': use 'val/loss'")),
    fit(
        f"{PLATEAU}val/loss --trainer.limit_val_batches=0",
        "`monitor` of ReduceLROnPlateau",
        "`limit_val_batches` above 0",
    ),
    again(
        fit(
            f"{SCHEDULER}ReduceLROnPlateau",
            "`model.lr_scheduler`",
            "set model.lr_scheduler.monitor",
        )
    ),
    fit(
        f"{SCHEDULER}torch.optim.lr_scheduler.ReduceLROnPlateau",
        "`lr_scheduler` must say what it monitors",
        "lightning.pytorch.cli.ReduceLROnPlateau",
    ),
    again(
        fit(f"{SCHEDULER}StepLR {OF_SCHEDULER}step_size=-1", "`lr_scheduler`", "of 1 or more steps")
    ),
    fit(
        f"{SCHEDULER}StepLR {OF_SCHEDULER}step_size=1 {OF_SCHEDULER}gamma=1e300",
        "`model.lr_scheduler`",
        "lower `lr`",
    ),
    again(fit(f"{ADAM}lr=fast", "model.optimizer.lr", "float")),
    again(fit(f"{ADAM}momentum=0.9", "`model.optimizer.momentum`", "betas")),
    file(
        "model: {init_args: {optimizer: {class_path: AdamW, init_args: {lr: .inf}}}}",
        "`lr`",
        "finite",
    ),
    again(fit("--model.lr_scheduler=StepLR", "step_size", "set model.lr_scheduler.step_size")),
    fit(
        "--model.lr_scheduler=StepLR --model.lr_scheduler.step_size=0",
        "`lr_scheduler`",
        "1 or more steps",
    ),
]

DATA = [
    again(own("--data=EightGaussian", "data", "use EightGaussians")),
    own("", "`data`", "fit --data Digits"),
    own("--data=Digits", "`network`", "shape of the data"),
    own("--data=Digits --data.validation_fraction=0", "`validation_fraction`", "between 0 and 1"),
    fit("--data.batch_size=513", "`batch_size`", "smaller batch"),
    again(fit("--data.batch_size=0", "`batch_size`", "at least 1")),
    again(fit("--data.batch_size=null", "`data.batch_size`", "got null: give it one")),
    again(fit("--data.num_samples=0", "`num_samples`", "use 1 or more")),
    again(fit("--data.std=.nan", "`data.std`", "must be a number")),
    again(own("--data=CIFAR10", "`data` must be a class", "Digits, ImageFolder")),
    own("--data=ImageFolder", "`data`", "set data.path and data.size"),
    again(own("--data=torch.utils.data.DataLoader", "`data` must be a class", "use CachedLatents")),
    again(fit("--data.num_worker=2", "`data.num_worker`", "use num_workers")),
    own(f"{IMAGES}nowhere", "`path`", "existing folder"),
    own(f"{IMAGES}empty", "`path`", ".png"),
    own(f"{IMAGES}broken --data.batch_size=1", "broken/a.png", "repair or remove it"),
    own(f"{IMAGES}broken --data.background=whit", "`background`", "use one such as 'white'"),
    again(
        own(f"{IMAGES}broken --data.background=[1,2]", "`data.background`", "3 elements or text")
    ),
    again(own(f"{IMAGES}broken --data.channels=2", "data.channels", "4")),
    again(own(f"{IMAGES}broken --data.cache_bytes=-1", "`cache_bytes`", "at least 0")),
    again(fit("--model.sigma_data=wide", "model.sigma_data", "'auto'")),
]

TRAINER = [
    again(fit("--trainer.max_steps=many", "trainer.max_steps", "int")),
    fit("--trainer.max_step=2", "`--trainer.max_step`", "use trainer.max_steps"),
    fit("--see=3", "`--see`", "--print_config"),
    fit("--trainer.max_steps=0", "`trainer.max_steps`", "use 1 or more"),
    again(fit("--trainer.max_epochs=0", "`trainer.max_epochs`", "use 1 or more")),
    again(fit("--trainer.max_steps=-5", "`trainer.max_steps`", "at least -1")),
    fit("--trainer.min_steps=5", "`trainer.min_steps`", "at most `trainer.max_steps`"),
    fit("--trainer.max_time=soon", "`trainer.max_time`", "00:01:30:00"),
    again(fit("--trainer.max_time=00:00:00:00", "`trainer.max_time`", "above 0")),
    again(fit("--trainer.limit_train_batches=0", "`trainer.limit_train_batches`", "use 1 or more")),
    again(
        fit("--trainer.limit_train_batches=0.0", "`trainer.limit_train_batches`", "use 1 or more")
    ),
    fit("--trainer.limit_train_batches=1.5", "`trainer.limit_train_batches`", "between 0 and 1"),
    fit("--trainer.limit_val_batches=-1", "limit_val_batches", "has to be in [0.0, 1.0]"),
    again(fit("--trainer.num_nodes=0", "`trainer.num_nodes`", "use 1")),
    fit("--trainer.num_nodes=2", "`trainer.num_nodes`", "by torchrun or srun, or set MASTER_ADDR"),
    fit("--trainer.barebones=true", "`trainer.barebones`", "leave it out"),
    again(
        fit("--trainer.gradient_clip_val=.nan", "`trainer.gradient_clip_val`", "must be a number")
    ),
    fit("--trainer.profiler=foo", "profiler", "'simple'"),
    fit("--trainer.accelerator=cpuu", "accelerator='cpuu'", "Available names"),
    fit("--trainer.logger=CometLogger", "CometLogger", "pip install"),
    fit("--trainer.logger=TensorBoardLogger --trainer.logger.save_dir=x", "TensorBoard", "install"),
    fit("--trainer.logger.save_dir=null", "`trainer.logger`", "set trainer.logger.save_dir"),
    fit("--trainer.callbacks.monitor=x", "trainer.callbacks.monitor", "`class_path`"),
    fit("--lr=1e-3", "`--lr`", "use model.optimizer.lr"),
    again(fit("--trainer.max_steps", "`--trainer.max_steps`", "write --trainer.max_steps=VALUE")),
    fit("--trainer=3", "`trainer` must be a section", "one by one"),
    again(
        fit("--trainer.callbacks=lightning_vr.CARV", "`trainer.callbacks`", "give the full path")
    ),
    again(fit("--trainer.logger=3", "`trainer.logger` must be a class", "give the full path")),
    again(fit("--trainer.gpus=1", "trainer.gpus", "--print_config")),
    fit("--trainer.accelerator=gpu", "trainer.accelerator", "use auto"),
    fit("--trainer.devices=0", "trainer.devices", "use auto"),
    fit("--trainer.strategy=dpp", "`trainer.strategy`", "use auto, ddp"),
    fit(
        "--trainer.strategy=ddp --trainer.devices=-2",
        "trainer.devices",
        "use auto",
    ),
    fit("--trainer.precision=fp16", "trainer.precision", "'16-mixed'"),
    fit("--trainer.precision=16-mixed", "trainer.precision", "use bf16-mixed"),
    fit("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches", "use 1"),
    fit("--trainer.val_check_interval=0", "trainer.val_check_interval", "limit_val_batches=0"),
    again(fit("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val", "at least 0")),
    fit("--trainer.logger.save_dir=taken", "trainer.logger.save_dir", "folder"),
    fit("--seed_everything=-1", "seed_everything", "use 0"),
    again(fit("--modle.network=ResidualMLP", "modle.network", "use model.network")),
    again(fit("--batch_size=16", "batch_size", "use data.batch_size")),
]

CALLBACKS = [
    callback("{class_path: TargetVarianc}", "trainer.callbacks", "use TargetVariance"),
    callback("{TargetVariance: {samples: 99}}", "TargetVariance.samples", "`class_path`"),
    callback("{class_path: SampleGrid}, {class_path: SampleGrid}", "SampleGrid", "leave one"),
    callback(
        "{class_path: SampleGrid}",
        "SampleGrid",
        "`limit_val_batches` above 0",
        "--trainer.limit_val_batches=0",
    ),
    again(
        callback(
            "{class_path: TargetVariance, init_args: {sample: 99}}",
            "`trainer.callbacks.sample`",
            "use samples",
        )
    ),
    again(
        callback(
            "{class_path: TargetVariance, init_args: {samples: 1}}", "`samples`", "at least 64"
        )
    ),
    callback(
        "{class_path: TargetVariance, init_args: {references: [1000]}}",
        "`references`",
        "use fewer",
    ),
    callback(
        "{class_path: FrechetDistance, init_args: {samples: 2}}", "`samples`", "use more samples"
    ),
    callback(
        "{class_path: FrechetDistance, init_args: {features: DigitFeatures}}",
        "'digits'",
        "use other features",
    ),
    again(callback("{class_path: EMA, init_args: {decay: .nan}}", "decay", "a number")),
    callback(
        "{class_path: EMA, init_args: {update_every_n_steps: 0}}",
        "`update_every_n_steps`",
        "at least 1",
    ),
    callback(
        "{class_path: EMAWeightAveraging, init_args: {update_every_n_steps: 0}}",
        "`trainer.callbacks.update_every_n_steps`",
        "at least 1",
    ),
    again(
        callback(
            "{class_path: ModelCheckpoint, init_args: {dirpath: a}}, "
            "{class_path: ModelCheckpoint, init_args: {dirpath: b}}",
            "`trainer.callbacks`",
            "`dirpath` and others do not count",
        )
    ),
    again(
        callback(
            "{class_path: EarlyStopping, init_args: {monitor: val/los}}",
            "`monitor` of EarlyStopping",
            "use 'val/loss'",
        )
    ),
    again(
        callback(
            "{class_path: EarlyStopping, init_args: {monitor: val/loss}}",
            "`monitor` of EarlyStopping",
            "`limit_val_batches` above 0",
            "--trainer.limit_val_batches=0",
        )
    ),
    callback(
        "{class_path: ModelCheckpoint, init_args: {monitor: frechet_distance/identity_n9}}, "
        "{class_path: FrechetDistance, init_args: {samples: 100}}",
        "`monitor` of ModelCheckpoint",
        "use 'frechet_distance/identity_n100'",
    ),
    callback(
        "{class_path: FrechetDistance, init_args: {samples: 100}}",
        "The training set",
        "use more data",
        "--data.num_samples=2 --data.batch_size=2",
    ),
    again(callback("{class_path: EarlyStopping}", "monitor", "set trainer.callbacks.monitor")),
    again(
        callback(
            "{class_path: ModelCheckpoint, init_args: {monitor: val_loss}}",
            "'val_loss'",
            "'val/loss'",
        )
    ),
    callback("{class_path: EMA, init_args: {decay: 2}}", "`decay`", "use 0.999"),
    again(
        callback(
            "{class_path: EMAWeightAveraging, init_args: {decay: 2}}", "decay", "between 0 and 1"
        )
    ),
]

FILES = [
    file("model: [", "`config`", "fix the YAML"),
    file("- a\n- b", "`config`", "file of settings"),
    file("network: ResidualMLP", "network", "use model.network"),
    file("trainer: {max_step: 5}", "trainer.max_step", "use trainer.max_steps"),
    again(
        file(
            "model: {init_args: {network: {class_path: ResidualMLP, width: 32}}}",
            "model.network",
            "under `init_args`",
        )
    ),
    file("trainer: {max_steps: null}", "`trainer.max_steps`", "got null: give it one"),
    file("model: &a\n  init_args: *a", "`config`", "contains itself"),
    file("trainer:\n  callbacks: &a\n  - *a", "`config`", "contains itself"),
    file("trainer: {max_steps: 1}\ntrainer: {max_steps: 2}", "`config`", "'trainer' twice"),
    again(file("trainer:\n\tmax_steps: 1", "`config`", "fix the YAML")),
    file("fit:\n  trainer: {max_steps: 2}", "`fit` is the subcommand", "at the top"),
    file("1: 2", "`config`", "keys, got 1"),
    file("", "`config`", "begin a section"),
    file('trainer: {logger: {init_args: {save_dir: "a\\0b"}}}', "`save_dir`", "NUL"),
    fit("--config=binary", "`config` must be a file of UTF-8 text, got binary", "save it as"),
    again(fit("--config=utf16", "`config` must be a file of UTF-8 text, got utf16", "save it as")),
    again(fit("--config=nul", "`config`", "fix the YAML")),
    fit("--config=empty", "`config`", "name a file"),
    fit("--config", "`--config` must have a value", "--config=VALUE"),
    fit("--config=nowhere.yaml", "config", "does not exist"),
    fit("--ckpt_path=nowhere.ckpt", "`ckpt_path`", "checkpoint file or 'last'"),
    fit("--ckpt_path=last", "`ckpt_path`", "name the file"),
]

OTHERS = [
    Bad("--ckpt_path=bad.yaml", "`ckpt_path`", "whole file", yaml="a: 1", command="validate"),
    Bad("--ckpt_path=truncated.ckpt", "`ckpt_path`", "whole file", command="validate"),
    Bad("", "`model`", "--model.network ResidualMLP", command="validate", network=[]),
    again(Bad("", "`data`", "test --data Digits", command="test", data=[])),
    Bad("", "`ckpt_path`", "trained module", command="predict"),
    Bad("--num_samples=0", "num_samples", "above 0", command="predict"),
    again(Bad("--budget=-1", "budget", "above 0", command="audit")),
    Bad("--candidates=nowhere.yaml", "`candidates`", "YAML file", command="audit"),
    audit("- name: [", "`candidates`", "fix it there"),
    again(audit("- {name: a, target: Stff}", "candidates.target", "use STF")),
    again(audit("- {name: a, taget: STF}", "`candidates.taget`", "use target")),
    audit(
        "- {name: a, target: {class_path: STF, init_args: {references: 600}}}",
        "`references`",
        "use fewer",
    ),
    again(
        Bad(
            "--trainer.limit_val_batches=0",
            "`trainer.limit_val_batches`",
            "1 or more",
            None,
            "validate",
        )
    ),
    again(Bad("--candidates=binary", "`candidates`", "fix it there", command="audit")),
    Bad("", "trian", "'fit'", command="trian"),
]

CASES = [*MODEL, *ESTIMATORS, *OPTIMIZATION, *DATA, *TRAINER, *CALLBACKS, *FILES, *OTHERS]


def test_there_are_at_least_130():
    assert len(set(map(str, CASES))) == len(CASES)
    assert sum(not bad.again for bad in CASES) >= 130


@pytest.fixture(autouse=True)
def no_classes_of_other_tests(monkeypatch):
    """Name the classes that a process of its own would name."""
    below = close_names._below

    def of_packages(kind):
        files = {
            each: getattr(sys.modules.get(each.__module__), "__file__", "") for each in below(kind)
        }
        return [each for each, file in files.items() if not str(file).startswith(TESTS)]

    monkeypatch.setattr(close_names, "_below", of_packages)


@pytest.fixture(autouse=True)
def folder(folder):
    """The files that the configurations name."""
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    for name in ("broken/a.png", "broken/b.png", "taken"):
        (folder / name).write_text("no image")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "utf16").write_text("model:", encoding="utf-16")
    (folder / "nul").write_bytes(b"model: {}\x00")
    (folder / "truncated.ckpt").write_bytes(b"PK\x03\x04 and no more")
    return folder


def arguments(bad, folder):
    """Return what follows the subcommand."""
    config = []
    if bad.yaml is not None:
        (folder / "bad.yaml").write_text(bad.yaml)
        config = ["--config=bad.yaml"] if "bad.yaml" not in bad.flags else []
    return [*bad.network, *bad.data, *SHORT, *config, *shlex.split(bad.flags)]


@pytest.mark.parametrize(
    "bad",
    [pytest.param(bad, marks=pytest.mark.slow if bad.again else ()) for bad in CASES],
    ids=lambda bad: f"{bad.command} {bad.flags or bad.yaml}",
)
def test_a_bad_configuration_is_one_line_that_names_the_argument_and_the_fix(bad, folder, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([bad.command, *arguments(bad, folder)])
    assert exit_.value.code == 2

    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = printed.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:], printed
    assert bad.argument in errors[0], errors[0]
    assert bad.fix in errors[0], errors[0]
    assert len(errors[0]) < 500, errors[0]


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (f"{CARV}resamples=3 --model.draws.antithetic=true", ["--model.draws.resamples=4"]),
        (
            "--model.num_classes=8 --model.network.num_class_embeds=8",
            ["--model.network.num_class_embeds=9"],
        ),
        (
            "--model.num_classes=4 --model.network.num_class_embeds=9",
            ["--model.num_classes=8"],
        ),
        (f"{STF}references=513", ["--model.target.references=all"]),
        ("--trainer.precision=16-mixed", ["--trainer.precision=bf16-mixed"]),
        ("--trainer.accumulate_grad_batches=0", ["--trainer.accumulate_grad_batches=1"]),
        ("--model.network.dimension=3", ["--model.network.dimension=2"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_fix_that_a_line_names_makes_the_configuration_run(flags, fix, folder):
    assert flags in {bad.flags for bad in CASES}  # where the line is looked at
    command = ["fit", *NETWORK, *POINTS, *SHORT, "--trainer.fast_dev_run=true", *shlex.split(flags)]
    main([*command, *fix])
