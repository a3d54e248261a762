"""Runs that are stopped at any place in any way and resumed, against the run that is not."""

import functools
import os
import signal
import warnings
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers.logger import Logger
from support.comparisons import assert_equal
from support.stops import StoppedError
from support.trainers import quiet_trainer
from torch import nn

from lightning_vr import EMA, ResumableModule
from lightning_vr.data import EightGaussians

BATCHES = 5
"""Batches in an epoch: a window of three, and one that the epoch's end cuts short."""

VALIDATIONS = {
    "each epoch": {},
    "n = epoch": {"check_val_every_n_epoch": None, "val_check_interval": BATCHES},
    "n < epoch": {"check_val_every_n_epoch": None, "val_check_interval": 3},
    "n > epoch": {"check_val_every_n_epoch": None, "val_check_interval": 7},
    "fraction": {"val_check_interval": 0.5},
    "none": {"limit_val_batches": 0},
}
# hooks, and which call: within an epoch, at its end, and within the next
BATCH, VALIDATION, EPOCH, FIT = (2, BATCHES, BATCHES + 3), (1, 2), (1, 2), (1,)
HOOKS = {
    "on_train_batch_start": BATCH,
    "module.training_step": BATCH,
    "on_before_backward": BATCH,
    "on_after_backward": BATCH,
    "on_before_zero_grad": BATCH,
    "on_before_optimizer_step": BATCH,
    "module.optimizer_step": BATCH,
    "on_train_batch_end": BATCH,
    "module.on_train_batch_end": BATCH,
    "on_validation_start": VALIDATION,
    "on_validation_epoch_start": VALIDATION,
    "on_validation_batch_start": VALIDATION,
    "on_validation_batch_end": VALIDATION,
    "on_validation_epoch_end": VALIDATION,
    "module.on_validation_epoch_end": VALIDATION,
    "on_validation_end": VALIDATION,
    "module.on_validation_end": VALIDATION,
    "on_train_epoch_start": EPOCH,
    "module.lr_scheduler_step": EPOCH,
    "on_train_epoch_end": EPOCH,
    "module.on_train_epoch_end": EPOCH,
    "on_train_start": FIT,
    "on_train_end": FIT,
    "on_fit_end": FIT,
}
RUN_ENDS = ("max_steps", "max_time", "should_stop")
"""Ends after which a run is as if it were over."""

PLACES = [f"{hook} {count}" for hook, counts in HOOKS.items() for count in counts]
# for few runs: each hook of a batch at one call in turn, the first and last ones at all
SOME_PLACES = [
    place
    for i, place in enumerate(PLACES)
    if (i + i // 3) % 3 == 0 or place.endswith(("batch_end 8", " 1")) or "on_train_batch" in place
]
ONCE_A_STEP = ("on_before_zero_grad", "on_before_optimizer_step", "module.optimizer_step")
ENDS = ["SIGTERM", "SIGINT", "exception", "max_steps", "max_time", "should_stop"]
FACTORS = {
    "place": PLACES,
    "end": ENDS,
    "validation": list(VALIDATIONS),
    "accumulation": [1, 3],
    "averages": [False, True],
    "workers": [0, 1],
}


def is_allowed(row):
    """Whether the place comes in the run, and can be ended like that."""
    hook, count = row["place"].split()
    if hook == "on_fit_end" and row["end"] == "SIGTERM":
        return False  # handlers of signals are gone: the process ends
    runs = {"none": 0, "n > epoch": 1}.get(row["validation"], 2)
    return "validation" not in hook or int(count) <= runs


class Denoiser(ResumableModule):
    """It has noise, a scheduler, and numbers of steps and of epochs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        noise = torch.randn_like(batch["x0"])
        loss = (self.layer(batch["x0"] + noise) - batch["x0"]).square().mean()
        self.log("train/loss", loss, on_epoch=True, on_step=True)
        self.log("train/most", loss, on_epoch=True, reduce_fx=max)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.layer(batch["x0"]) - batch["x0"]).square().mean())

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.log("weight", self.layer.weight.mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]


class Rows(Logger):
    """Keeps what is logged in memory: {(step, name): values}."""

    name, version, save_dir = "rows", 0, None

    def __init__(self, found):
        super().__init__()
        self.found = found

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            if name != "epoch":
                self.found.setdefault((step, name), set()).add(value)


class Events(Callback):
    """Keeps in checkpoints what has ended: batches, validation runs and epochs."""

    def __init__(self, name):
        self.name, self.batches, self.validations, self.epochs = name, [], [], []

    @property
    def state_key(self):
        return self.name

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append([trainer.current_epoch, batch_idx, *batch["index"].tolist()])

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            value = float(trainer.callback_metrics["val/loss"])
            self.validations.append([len(self.batches), trainer.global_step, value])

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append([len(self.batches), trainer.global_step])

    def state_dict(self):
        names = ("batches", "validations", "epochs")
        return {name: list(getattr(self, name)) for name in names}

    def load_state_dict(self, state):
        vars(self).update(state)


class Clock(Timer):
    """A limit of time that is over when it is told."""

    is_over = False

    def __init__(self):
        super().__init__(duration={"days": 1})

    def time_elapsed(self, *_):
        return 1e6 if self.is_over else 0.0


class Stop(Callback):
    """Ends a run at the n-th call of a hook."""

    def __init__(self, hook, count, end, clock, path):
        self.count, self.end, self.clock, self.path = count, end, clock, path
        self.has_stopped = False
        self.method = hook.partition("module.")[2]
        if not self.method:
            setattr(self, hook, self.stop)

    def setup(self, trainer, module, stage):
        if self.method:
            method = getattr(module, self.method)

            def call(*args, **kwargs):
                found = method(*args, **kwargs)
                self.stop(trainer)
                return found

            setattr(module, self.method, call)

    def stop(self, trainer, *_):
        self.count -= not trainer.sanity_checking
        if self.count:
            return
        self.has_stopped = True
        if self.end == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.end == "SIGINT":
            raise KeyboardInterrupt
        elif self.end == "exception":
            raise StoppedError
        elif self.end == "max_steps":  # what a user saves by hand
            trainer.save_checkpoint(self.path)
            trainer.fit_loop.epoch_loop.max_steps = max(1, trainer.global_step)
        elif self.end == "max_time":
            self.clock.is_over = True
        else:
            trainer.should_stop = True


@dataclass
class Run:
    """What a run leaves behind."""

    state: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)
    has_stopped: bool = False
    is_resumed: bool = False
    messages: list = field(default_factory=list)


WARNINGS = ("not as if it had not", "has not seen the end of that batch", "are lost", "made: run")
"""What a run says that does not go on exactly."""

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "lightning_vr")


def fit(folder, row, stop=None, ckpt_path=None, found=None, **options):
    """Train; return the state at the end and all rows of the log."""
    found = Run() if found is None else found
    torch.manual_seed(5 if ckpt_path is None else 6)  # what a resumed run must not depend on
    clock = Clock()
    stopping = [] if stop is None else [Stop(*stop, clock, folder / "saved.ckpt")]
    saver = ModelCheckpoint(folder, save_last=True, save_on_exception=True, every_n_train_steps=99)
    averages = [EMA(decay=0.9)] if row["averages"] else []
    trainer = quiet_trainer(
        clock,
        Events("before"),
        *stopping,
        Events("after"),
        *averages,
        saver,
        logger=Rows(found.rows),
        enable_checkpointing=True,
        log_every_n_steps=1,
        max_epochs=2,
        accumulate_grad_batches=row["accumulation"],
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **(VALIDATIONS[row["validation"]] | options),
    )
    data = EightGaussians(2, num_samples=2 * BATCHES, num_validation=4, num_workers=row["workers"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Denoiser()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress(SystemExit, StoppedError):
            trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it at an end
    found.messages = [str(each.message) for each in caught]
    found.has_stopped = any(each.has_stopped for each in stopping)
    if stop is None:
        trainer.save_checkpoint(folder / "end.ckpt")
        # what a stranger could have written is read slowly; resumed runs read like that
        found.state = torch.load(folder / "end.ckpt", weights_only=False)
    return found


@functools.cache
def whole(folder, validation, accumulation, averages):
    """Return a run that is not stopped, and how often each hook of a batch was called in it."""
    row = {"validation": validation, "accumulation": accumulation, "averages": averages}
    return fit(folder, row | {"workers": 0})


def stop_and_resume(folder, row):
    """Stop a run and resume it, from the start if nothing was saved; return what it leaves."""
    hook, count = row["place"].split()
    if hook in ONCE_A_STEP:
        count = 1 + (int(count) - 1) // row["accumulation"]
    stopped = fit(folder, row, stop=(hook, int(count), row["end"]))
    assert stopped.has_stopped
    path = folder / ("saved.ckpt" if row["end"] == "max_steps" else "last.ckpt")
    found = Run(rows=stopped.rows, is_resumed=path.exists())
    return fit(folder, row, ckpt_path=path if path.exists() else None, found=found)


def cannot_be_exact(row):
    """Whether a stop at this place leaves a state that no checkpoint can hold."""
    hook = row["place"].split()[0]
    if row["end"] not in ("SIGINT", "exception", "max_steps"):
        return False
    if hook in ("module.optimizer_step", "module.lr_scheduler_step", "on_train_batch_end"):
        return True  # weights have changed, and others have not seen it
    # gradients of several batches are added up, of which one is taken again
    is_adding_up = hook in ("on_after_backward", "on_before_optimizer_step")
    return is_adding_up and row["accumulation"] > 1


def outcome(folder, found, row):
    """Compare a run that was stopped with one that was not; return "exact" or "warned"."""
    expected = whole(folder, row["validation"], row["accumulation"], row["averages"])
    if any(text in message for text in WARNINGS for message in found.messages):
        return "warned"
    # a run that ends within an epoch ends that epoch, and validates first if it is asked to stop
    may_add = row["end"] in RUN_ENDS
    for name in ("before", "after"):
        mine, others = found.state["callbacks"][name], expected.state["callbacks"][name]
        for kind in ("validations", "epochs"):
            number = len(mine[kind]) - len(others[kind])
            assert 0 <= number <= may_add, (name, kind, mine[kind])
            for place in range(len(others[kind])) if number else ():
                if mine[kind][place] != others[kind][place]:
                    break
            else:
                place = -1
            if number:
                del mine[kind][place]
    mine, others = (each.state["lightning_vr"]["metrics"] for each in (found, expected))
    if may_add and "val/loss" in others:  # of the last validation run
        mine["val/loss"] = others["val/loss"]
    for part in PARTS:
        assert_equal(_own(found.state[part]), _own(expected.state[part]), part)
    added = found.rows.keys() - expected.rows.keys()
    assert len({step for step, _ in added}) <= 2 * may_add, added
    for key, values in expected.rows.items():
        more = found.rows.get(key, set()) - values
        assert values <= found.rows.get(key, set()), (key, values)
        assert len(more) <= may_add, (key, more)
    return "exact"


def _own(state):
    """A part of a checkpoint without what names folders and times."""
    return (
        {k: v for k, v in state.items() if not str(k).startswith(("ModelCheck", "Clock"))}
        if (isinstance(state, dict))
        else state
    )
