"""What Weights & Biases shows of a run before anybody has arranged its page.

A page has a section for each prefix of a name, such as ``convergence``: numbers, picture and table
of one thing stand together. The table of runs has the last value of a number, and of those that
training should make small also the smallest. Plots of ``epoch`` against the step are left out.
"""

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_vr.lifecycle.loggers import training_goes_on
from lightning_vr.lifecycle.trainer_callbacks import callbacks_of

_SMALL = ("val/loss", "convergence/excess", "evaluation/bits_per_dimension")
_SMALL_PREFIX = "frechet_distance/"
_STEP = "trainer/global_step"


def define_page(trainer: Trainer) -> None:
    """Define the page when training starts; all ranks call it.

    Lightning has defined the step of all names. It holds for those of a prefix too, so that only a
    whole name can be defined otherwise; callbacks know theirs once they have seen the data.
    """
    callbacks = callbacks_of(trainer)
    logged = [name for each in callbacks for name in getattr(each, "logged", ())]
    measured = [x for x in logged if x.startswith(_SMALL_PREFIX) and x != _SMALL_PREFIX]
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        with training_goes_on(trainer, "The page of Weights & Biases"):
            define = logger.experiment.define_metric
            for name in (*_SMALL, *measured):
                define(name, step_metric=_STEP, summary="last,min")
            define("epoch", step_metric=_STEP, hidden=True)
