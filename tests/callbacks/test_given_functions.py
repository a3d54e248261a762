"""Functions that callbacks are given on modules of other kinds."""

import pytest
import torch

from lightning_vr import (
    VP,
    Convergence,
    ConvergenceMonitor,
    FrechetDistance,
    GradientSignal,
    GradientVariance,
    SampleGrid,
    TargetVariance,
)

GIVEN = {"schedule": VP()}


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: Convergence(loss="mse", **GIVEN), "loss"),
        (lambda: Convergence(loss=print, clean="image", **GIVEN), "clean"),
        (lambda: ConvergenceMonitor(torch.zeros(4, 2), loss="mse", **GIVEN), "loss"),
        (lambda: GradientVariance(loss="mse", **GIVEN), "loss"),
        (lambda: GradientSignal(loss=print, clean="image", **GIVEN), "clean"),
        (lambda: TargetVariance(clean="image", **GIVEN), "clean"),
        (lambda: FrechetDistance(sample="model"), "sample"),
        (lambda: SampleGrid(sample="model"), "sample"),
    ],
)
def test_what_is_no_function_is_refused_when_the_callback_is_built(build, name):
    with pytest.raises(ValueError, match=f"`{name}` must be a function, got '.*': pass one"):
        build()
