"""What Weights & Biases shows of a run before anybody has arranged its page.

A page has a section for each prefix of a name, such as ``excess_loss``: numbers, picture and table
of one thing stand together. The table of runs has the last value of a number, and of those that
training should make small also the smallest. Plots of ``epoch`` against the step are left out.
"""

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_vr.lifecycle.loggers import training_goes_on

_SMALL = ("val/loss", "excess_loss/total", "frechet_distance/*", "evaluation/bits_per_dimension")
_STEP = "trainer/global_step"


def define_page(trainer: Trainer) -> None:
    """Define the page of a run that begins; all ranks call it.

    Definitions of single names come before that of all names, which Lightning makes: each must name
    the step too.
    """
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        with training_goes_on(trainer, "The page of Weights & Biases"):
            define = logger.experiment.define_metric
            for name in _SMALL:
                define(name, step_metric=_STEP, summary="last,min")
            define("epoch", step_metric=_STEP, hidden=True)
