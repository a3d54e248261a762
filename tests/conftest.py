"""What all tests share: schedules, prediction types and z-scores."""

from typing import get_args

import pytest
import torch

from lightning_vr.predictions import PredictionType
from lightning_vr.schedules import EDM, VE, VP, Cosine, RectifiedFlow


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
