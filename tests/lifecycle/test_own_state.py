"""Each value of the state that a fit goes on from, replaced by others: one line, no nonsense."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from support.networks import small_mlp
from support.stops import StopAt, StoppedError
from support.trainers import quiet_trainer
from torch.optim.lr_scheduler import StepLR

from lightning_vr import DiffusionModule, TargetVariance
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle.checkpoint_contents import check_contents, check_training_state
from lightning_vr.lifecycle.own_state import STATE

GARBAGE = [None, "words", -1, 1e300, {}]
MAY_BE_NOTHING = {
    "sigma_data",
    "sample_shape",
    "objects",
    "window",
    "row",
    "torn",
    "data",
    "csv_rows",
}
MAY_BE_EMPTY = {"csv_rows", "metrics", "sums", "gradients", "numbers"}
ANY_TEXT = {"left", "torn", "data", "objects"}


def fit(*callbacks, **options):
    trainer = quiet_trainer(
        TargetVariance([4], noise_levels=3, samples=64),
        EarlyStopping("val/loss"),
        *callbacks,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        val_check_interval=2,
        max_steps=6,
    )
    module = DiffusionModule(small_mlp(), lr_scheduler=lambda optimizer: StepLR(optimizer, 100))
    data = EightGaussians(batch_size=16, num_samples=160, num_validation=16)
    trainer.fit(module, data, **options)
    return trainer


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The checkpoint of a run within an epoch and within an optimizer step."""
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    with pytest.raises(StoppedError):
        fit(StopAt("on_train_batch_end", 3, path))
    return torch.load(path, weights_only=True)


def places(state, place=()):
    """The places of all values below one."""
    if isinstance(state, torch.Tensor) or not isinstance(state, (dict, list, tuple)):
        return [place]
    pairs = list(state.items() if isinstance(state, dict) else enumerate(state))
    if all(isinstance(value, torch.Tensor) for _, value in pairs):
        pairs = pairs[:2]  # one parameter is as good as another
    return [place, *(found for key, value in pairs for found in places(value, (*place, key)))]


def replaced(checkpoint, place, value):
    changed = copy.deepcopy(checkpoint)
    at = changed
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return changed


def is_plausible(place, value):
    last = [key for key in place if isinstance(key, str)][-1]
    if value is None:
        return last in MAY_BE_NOTHING or "sizes" in place
    if value == {}:
        return last in MAY_BE_EMPTY
    return isinstance(value, str) and last in ANY_TEXT and (len(place) > 2 or last != "left")


def check(checkpoint):
    """What is looked at before anything is restored to go on with a fit."""
    check_contents(checkpoint, "x.ckpt")
    check_training_state(checkpoint, "x.ckpt")


def test_no_value_of_the_own_state_can_be_replaced_by_one_of_another_kind(good):
    refused = []
    for place in places(good[STATE])[1:]:
        for value in GARBAGE:
            if is_plausible(place, value):
                continue
            damaged = replaced(good, (STATE, *place), value)
            with pytest.raises(ValueError, match=f"`{STATE}.*` in the checkpoint x.ckpt must be"):
                check(damaged)
            refused.append((place, value))
    assert len(refused) > 100


CALLBACKS = [
    ("EarlyStopping", "wait_count"),
    ("EarlyStopping", "patience"),
    ("EarlyStopping", "stopped_epoch"),
    ("EarlyStopping", "best_score"),
    ("TargetVariance", "logged_step"),
]


def state_key(checkpoint, name):
    return next(key for key in checkpoint["callbacks"] if key.startswith(name))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("value", ["words", None, 1e300, {}], ids=str)
@pytest.mark.parametrize(("name", "part"), CALLBACKS)
def test_a_callbacks_state_of_another_kind_is_refused(name, part, value, good, tmp_path):
    place = ("callbacks", state_key(good, name), part)
    torch.save(replaced(good, place, value), tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=rf"`callbacks\.{name}\.{part}` in the checkpoint"):
        fit(ckpt_path=tmp_path / "bad.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("place", "words"),
    [
        (("curve", "size"), "`size` must be a whole number"),
        (("curve", "divergence"), "`divergence` of a saved state must be a tensor"),
        (("curve", "ess", 4), "`ess` of a saved state must be a tensor"),
        (("removed", "sums"), "`sums` of a saved state must be a tensor"),
        (("removed", "recent"), "`recent` of a saved state must be a tensor"),
    ],
    ids=str,
)
def test_a_measured_curve_of_another_kind_is_refused(place, words, good, tmp_path):
    value = "words" if place[-1] in ("size", "sums", "recent") else (torch.ones(3), None)
    damaged = replaced(good, ("callbacks", state_key(good, "TargetVariance"), *place), value)
    torch.save(damaged, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=words):
        fit(ckpt_path=tmp_path / "bad.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("last_epoch", None),
        ("last_epoch", 1e300),
        ("_step_count", "words"),
        ("step_size", {}),
        ("gamma", float("nan")),
        ("base_lrs", [1e300]),
    ],
    ids=str,
)
def test_a_schedules_state_of_another_kind_is_refused(part, value, good, tmp_path):
    torch.save(replaced(good, ("lr_schedulers", 0, part), value), tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=rf"`lr_schedulers\.{part}` in the checkpoint .* got"):
        fit(ckpt_path=tmp_path / "bad.ckpt", weights_only=True)
