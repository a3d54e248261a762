"""What all tests share: schedules, prediction types, z-scores, and a quieter process."""

import ctypes
import functools
import gc
import logging
import os
import sys
from typing import get_args
from unittest import mock

import pytest
import torch
from _pytest.runner import pytest_runtest_protocol as run_protocol
from lightning.fabric.utilities import registry
from lightning.pytorch.trainer.connectors.logger_connector import result

from lightning_vr.process.predictions import PredictionType
from lightning_vr.process.schedules import EDM, VE, VP, Cosine, RectifiedFlow
from support.pictures import no_pictures, no_pictures_in_module  # noqa: F401  # fixtures
from support.ranks import on_ranks, on_two_ranks  # noqa: F401  # fixtures
from support.stacks import in_one_piece

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of options in glibc's malloc.h."""

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)


def pytest_configure(config):
    """Show a GPU to the tests that are for it alone: others fork, which CUDA does not survive."""
    if not asks_for(config, "gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.fsync = lambda descriptor: None  # what tests write need not outlast a loss of power
    # so long an end waits for a process of a loader that was left in the middle
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5
    # each trainer would read a file of each package that is installed
    registry.entry_points = functools.cache(registry.entry_points)
    if not torch.cuda.is_available():
        # each seed would wait for a GPU of each make, with the stack of its caller as text
        torch.random._manual_seed_impl = lambda seed: torch.default_generator.manual_seed(int(seed))
        # each value that is logged would be moved to the CPU, with copies of all that describes it
        result._ResultMetric.to = lambda metric, *device, **options: metric
    if sys.platform == "linux":
        keep_memory()


def keep_memory():
    """Let freed memory stay with the process: to get it again costs a page fault for each page."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            library.mallopt(option, 2**30)


def asks_for(config, marker):
    """Return whether `-m` selects tests with a marker."""
    expression = config.option.markexpr
    return marker in expression.replace(f"not {marker}", "")


def pytest_ignore_collect(collection_path, config):
    """Collect benchmarks only where nothing else is run."""
    if collection_path.name == "benchmarks" and not config.option.benchmark_only:
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector, name, obj):
    """Make the cases for a GPU, and those that take minutes, only if `-m` asks for them."""
    if not name.lower().startswith("test"):
        return None
    marked = {mark.name for mark in (*marks_of(collector.obj), *marks_of(obj))}
    optional = marked & {"gpu", "slow"}
    return None if all(asks_for(collector.config, each) for each in optional) else []


def pytest_collection_modifyitems(config, items):
    """Leave out cases of a test that are marked by themselves."""
    marks = [mark for mark in ("gpu", "slow") if not asks_for(config, mark)]
    left_out = [item for item in items if any(map(item.get_closest_marker, marks))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def marks_of(obj):
    marks = getattr(obj, "pytestmark", [])
    return marks if isinstance(marks, list) else [marks]


def pytest_collection_finish():
    """Spare the garbage collector what lives as long as the tests: modules and collected tests.

    And pytest its handlers at each of torch's loggers, six times a test: they log to the root.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch") and isinstance(logger, logging.Logger):
            logger.propagate = True
    gc.collect()
    gc.freeze()
    # a search takes as long as what it looks at, and little of that is circles
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Spare tests what Python does where calls pass the end of a piece of its stack."""
    return in_one_piece(run_protocol, item, nextitem)


@pytest.fixture(autouse=True)
def own_state():
    """Begin with the same seed; Lightning hands seeds and ports on through the environment."""
    torch.manual_seed(0)
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True, scope="module")
def own_state_of_module():
    """The same for the fixtures of a module, which come before those of a test."""
    torch.manual_seed(0)
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    with mock.patch.dict(os.environ):
        yield
    log.setLevel(level)  # scripts of examples make it quiet


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
