"""EMA against its recursions written out, and averages of lengths chosen after training."""

import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from support.networks import small_mlp
from support.stops import StopAt, StoppedError
from support.trainers import quiet_trainer
from torch import nn
from torch.nn.utils import parameters_to_vector

from lightning_vr import EMA, DiffusionModule, saved_average
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle.checkpoints import read_checkpoint
from lightning_vr.lifecycle.ema import Averages
from lightning_vr.lifecycle.power_averages import combination, exponent

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")

STEPS = 8


def module():
    torch.manual_seed(0)
    return DiffusionModule(small_mlp(std=0.3))


def fit(model, *callbacks, **options):
    data = EightGaussians(batch_size=16, num_samples=64, num_validation=16)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {"max_steps": STEPS, "max_epochs": -1, "enable_checkpointing": saves}
    path = options.pop("ckpt_path", None)
    loading = {"ckpt_path": path, "weights_only": True} if path else {}
    trainer = quiet_trainer(*callbacks, **(settings | options))
    trainer.fit(model, data, **loading)
    return trainer


class Seen(Callback):
    """The weights after each step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, *args):
        self.weights.append(parameters_to_vector(module.parameters()).detach().clone())


def vector(state):
    return torch.cat([state[name].flatten() for name, _ in module().named_parameters()])


def test_each_average_follows_its_recursion_and_the_first_is_left_in_the_module(tmp_path):
    seen, model = Seen(), module()
    saver = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=STEPS)
    lengths = [0.1, 0.2]
    ema = EMA(decay=[0.95, 0.5], relative_lengths=lengths, warmup=True, update_every_n_steps=2)
    fit(model, seen, ema, saver)

    taken = seen.weights[::2]
    factors = {
        **{decay: lambda t, d=decay: min(d, (1 + t) / (10 + t)) for decay in (0.95, 0.5)},
        **{s: lambda t, s=s: (1 - 1 / t) ** (exponent(s) + 1) for s in lengths},
    }
    expected = {}
    for key, factor in factors.items():
        expected[key] = taken[0]
        for t, weights in enumerate(taken[1:], start=2):
            expected[key] = factor(t) * expected[key] + (1 - factor(t)) * weights
    saved = read_checkpoint(tmp_path / "end.ckpt")
    found = {d: vector(saved_average([saved], decay=d)) for d in (0.95, 0.5)}
    found |= {s: vector(saved["averaging_state"]["weights"][2 + i]) for i, s in enumerate(lengths)}
    for key, average in expected.items():
        torch.testing.assert_close(found[key], average, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parameters_to_vector(model.parameters()), expected[0.95])
    assert torch.equal(vector(saved["current_model_state"]), seen.weights[-1])


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_an_exponent_has_the_relative_length_that_it_was_asked_for(length):
    gamma = exponent(length)
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    profile = (gamma + 1) * tau**gamma
    mean = (profile * tau).mean()
    assert math.isclose(float(profile.mean()), 1, rel_tol=1e-6)
    assert math.isclose(float((profile * (tau - mean) ** 2).mean()) ** 0.5, length, rel_tol=1e-6)


def test_saved_averages_give_one_of_another_length():
    generator = torch.Generator().manual_seed(0)
    steps, lengths, wanted = 512, (0.05, 0.1), 0.075
    weights = torch.randn(steps, 4, dtype=torch.float64, generator=generator).cumsum(0) / steps**0.5

    def averages(length):
        found = [weights[0]]
        for t in range(2, steps + 1):
            factor = (1 - 1 / t) ** (exponent(length) + 1)
            found.append(factor * found[-1] + (1 - factor) * weights[t - 1])
        return found

    saved = [(length, t) for length in lengths for t in range(32, steps + 1, 32)]
    kept = {length: averages(length) for length in lengths}
    factors = combination(saved, (wanted, steps))
    found = sum(f * kept[s][t - 1] for f, (s, t) in zip(factors, saved, strict=True))
    expected = averages(wanted)[-1]
    error = (found - expected).norm()
    assert error < 0.02 * min((kept[s][-1] - expected).norm() for s in lengths)
    # a saved one is itself
    itself = combination(saved, saved[-1])
    assert torch.allclose(itself[-1], torch.tensor(1.0).double(), atol=1e-3)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
def test_all_averages_resume_exactly(hook, tmp_path):
    def averages():
        return EMA(decay=[0.9, 0.5], relative_lengths=[0.1], warmup=True)

    options = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    ends = []
    for start in (None, tmp_path / "stop.ckpt"):
        if start is not None:
            with pytest.raises(StoppedError):
                fit(module(), averages(), StopAt(hook, 4 - 3 * ("val" in hook), start), **options)
        saver = ModelCheckpoint(
            tmp_path, filename=f"end-{start is None}", every_n_train_steps=STEPS
        )
        fit(module(), averages(), saver, ckpt_path=start, **options)
        ends.append(read_checkpoint(tmp_path / f"end-{start is None}.ckpt"))
    for whole, resumed in zip(*(end["averaging_state"]["weights"] for end in ends), strict=True):
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert torch.equal(*(vector(end["current_model_state"]) for end in ends))


def test_weights_in_16_bits_have_an_average_that_small_steps_move():
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    averages = Averages([0.999], [], warmup=False)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(model.weight, value)
        averages.update_parameters(model)
    assert math.isclose(float(averages.weights[0]["weight"]), 1.001, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "`decay` must be from 0 to below 1, got 1.0"),
        ({"decay": None}, "`decay` must be given without `relative_lengths`"),
        ({"relative_lengths": [0.3]}, "`relative_lengths` must be between 0 and 0.289"),
        ({"update_every_n_steps": 0}, "`update_every_n_steps` must be at least 1"),
    ],
)
def test_settings_that_average_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(**options)


def test_averages_of_another_kind_than_a_checkpoint_has_are_refused(tmp_path):
    path = tmp_path / "stop.ckpt"
    with pytest.raises(StoppedError):
        fit(module(), EMA(decay=0.9), StopAt("on_train_batch_end", 2, path))
    with pytest.raises(ValueError, match=r"`EMA` must keep the averages of the checkpoint"):
        fit(module(), EMA(decay=0.5), ckpt_path=path)
    with pytest.raises(ValueError, match="`decay` must be one of the saved"):
        saved_average([read_checkpoint(path)], decay=0.5)
    with pytest.raises(ValueError, match="needs checkpoints with power-function averages"):
        saved_average([read_checkpoint(path)], relative_length=0.1)


class Shared(nn.Module):
    """Two maps with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)
        self.last.weight = self.first.weight

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x)))


def shared():
    torch.manual_seed(0)
    return DiffusionModule(Shared())


class Wrapper(nn.Module):
    """Names a network as what torch.compile returns does."""

    def __init__(self):
        super().__init__()
        self._orig_mod = small_mlp(std=0.3)

    def forward(self, x, t):
        return self._orig_mod(x, t)


def wrapped():
    return DiffusionModule(Wrapper())


@pytest.mark.parametrize("make", [shared, wrapped])
def test_weights_with_several_names_are_averaged_saved_and_resumed_under_all(make, tmp_path):
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    ends = []
    for path in (None, tmp_path / "stop.ckpt"):
        if path is not None:
            with pytest.raises(StoppedError):
                fit(make(), EMA(0.5), StopAt("on_validation_batch_end", 1, path), **options)
        seen, model = Seen(), make()
        saver = ModelCheckpoint(tmp_path, filename=f"end-{path is None}", every_n_train_steps=STEPS)
        fit(model, seen, EMA(0.5), saver, ckpt_path=path, **options)
        ends.append(parameters_to_vector(model.parameters()))

        saved = read_checkpoint(tmp_path / f"end-{path is None}.ckpt")
        trained = make()
        trained.load_state_dict(saved["current_model_state"])
        assert torch.equal(parameters_to_vector(trained.parameters()), seen.weights[-1])
        for averaged in (saved["state_dict"], saved_average([saved], decay=0.5)):
            assert all(torch.equal(x, averaged[name]) for name, x in model.state_dict().items())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], seen.weights[-1])


class Switched(Callback):
    """Trains the first weight in some steps only."""

    def __init__(self, trains):
        self.trains = trains

    def on_train_batch_start(self, trainer, module, *args):
        first = next(module.network.parameters())
        first.requires_grad_(self.trains[trainer.global_step])


@pytest.mark.parametrize(
    ("trains", "start"), [([True] * 3 + [False] * 5, 0), ([False] * 3 + [True] * 5, 3)]
)
def test_a_weight_is_averaged_from_when_it_first_trains(trains, start):
    seen, model = Seen(), module()
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(model, Switched(trains), seen, EMA(0.5), **options)
    size = next(model.network.parameters()).numel()
    expected = seen.weights[start][:size]
    for weights in seen.weights[start + 1 :]:
        expected = 0.5 * expected + 0.5 * weights[:size]
    found = next(model.network.parameters()).detach().flatten()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, seen.weights[-1][:size])


class Foreign(LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.linear(batch["x0"]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("weight", self.linear.weight.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_module_has_averages_once_there_are_some(tmp_path):
    seen, model = Seen(), Foreign()
    start = parameters_to_vector(model.parameters()).detach().clone()
    fit(model, seen, EMA(0.5, update_starting_at_step=6))  # validates before, too
    average = 0.5 * seen.weights[6] + 0.5 * seen.weights[7]
    torch.testing.assert_close(parameters_to_vector(model.parameters()), average)
    assert not torch.equal(seen.weights[-1], start)

    with pytest.raises(StoppedError):  # while the average is in place
        fit(Foreign(), seen, EMA(0.5), StopAt("on_validation_batch_end", 1, tmp_path / "stop.ckpt"))
    trainer = fit(model, seen, EMA(0.5))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    end = parameters_to_vector(model.parameters()).detach().clone()
    for name, step in (("stop", -1 - STEPS), ("end", -1)):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        average, trained = saved["averaging_state"]["weights"][0], saved["current_model_state"]
        assert all(torch.equal(saved["state_dict"][key], x) for key, x in average.items())
        assert torch.equal(parameters_to_vector(trained.values()), seen.weights[step])
    data = EightGaussians(batch_size=16, num_samples=64, num_validation=16)
    trainer.validate(model, data, verbose=False, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(parameters_to_vector(model.parameters()), end)
