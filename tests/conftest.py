"""What all tests share: schedules, prediction types and z-scores."""

import os
from typing import get_args

import pytest
import torch

from lightning_vr.predictions import PredictionType
from lightning_vr.schedules import EDM, VE, VP, Cosine, RectifiedFlow


@pytest.fixture(autouse=True)
def no_seed_is_left_behind():
    """Lightning hands ``seed_everything`` on through the environment, to forked ranks too."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(params=[EDM, VE, VP, Cosine, RectifiedFlow], ids=lambda kind: kind.__name__)
def schedule(request):
    return request.param()


@pytest.fixture(params=get_args(PredictionType))
def kind(request):
    return request.param


@pytest.fixture
def source():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def z_score():
    """How many standard errors the mean of samples lies off what it should be."""

    def score(samples, expected=0.0):
        error = samples.double().std() / len(samples) ** 0.5
        return float((samples.double().mean() - expected) / error)

    return score
