"""Which weights count: those that train until an average exists, and that average from then on."""

import functools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.networks import small_mlp
from support.selections import mostly_slow
from support.stops import StopAt, StoppedError
from support.trainers import quiet_trainer
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from lightning_vr import CARV, EMA, DiffusionModule, LearnedProposal
from lightning_vr.data import EightGaussians
from lightning_vr.lifecycle.checkpoints import load_training_weights, read_checkpoint
from lightning_vr.lifecycle.weight_averaging import averaged_weights, trained_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists", "ignore:You're using the WeightAveraging"
)

STEPS = 6
NEVER = {"update_starting_at_step": 1000}
STARTS = {
    "never": NEVER,
    "never by epoch": {"update_every_n_steps": 0, "update_starting_at_epoch": 1000},
    "late": {"update_starting_at_step": 2},
    "at once": {},
    "ours never": NEVER,
    "ours late": {"update_starting_at_step": 2},
    "ours": {"update_starting_at_step": 0},
}
QUICK = [start for start in STARTS if start not in ("never by epoch", "ours never")]
FIRST = {"late": 2, "ours late": 2, "at once": 0, "ours": 0}
"""The first step that is averaged."""


def module():
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.AdamW, lr=0.05)
    draws = CARV(2, LearnedProposal(bins=2))
    return DiffusionModule(small_mlp(std=0.3), draws=draws, optimizer=optimizer)


def data():
    return EightGaussians(batch_size=16, num_samples=48, num_validation=16)


def averaging(start):
    kind = EMA if start.startswith("ours") else EMAWeightAveraging
    return kind(decay=0.5, **STARTS[start])


def trainer(*callbacks, **options):
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {"max_steps": STEPS, "max_epochs": -1, "enable_checkpointing": saves}
    return quiet_trainer(*callbacks, **(settings | options))


def requests():
    return DataLoader([{"index": torch.tensor(i)} for i in range(2)], batch_size=2)


def weights(network):
    return parameters_to_vector(network.parameters()).detach().clone()


class Trained(Callback):
    """Keeps the weights that train, and those that are validated."""

    def __init__(self):
        self.validated = []

    def on_train_batch_end(self, trainer, module, *args):
        self.last = weights(module)

    def on_validation_batch_end(self, trainer, module, *args):
        if not trainer.sanity_checking:
            self.validated.append(weights(module))


def vector(state):
    return torch.cat([state[name].flatten() for name, _ in module().named_parameters()])


@functools.cache
def by_hand(start):
    """The weights after each step without a callback, and their average from ``start`` on."""
    seen, network = [], module()

    class Keep(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(weights(module))

    trainer(Keep()).fit(network, data())
    first = FIRST.get(start)
    average = None
    for x in seen if first is None else seen[first:]:
        average = x if average is None or first is None else average.lerp(x, 0.5)
    return seen[-1], average


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("start", mostly_slow(list(STARTS), QUICK))
@pytest.mark.parametrize("is_alone", [True, False], ids=["weights alone", "whole checkpoints"])
def test_all_that_a_fit_leaves_holds_the_weights_that_count(start, is_alone, tmp_path):
    kept, network = Trained(), module()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=STEPS, save_weights_only=is_alone)
    # with validation runs that may swap weights before the checkpoint
    fit = trainer(kept, averaging(start), saver, val_check_interval=2, check_val_every_n_epoch=None)
    fit.fit(network, data())
    trained, expected = by_hand(start)
    torch.testing.assert_close(kept.last, trained)
    (path,) = tmp_path.iterdir()
    loaded = DiffusionModule.load_from_checkpoint(path)
    found = {
        "the module": network,
        "load_from_checkpoint": loaded,
        "predict": module(),
    }
    quiet_trainer().predict(found["predict"], requests(), ckpt_path=path, weights_only=True)
    for name, each in found.items():
        assert torch.allclose(weights(each), expected, atol=1e-6), name
    if not is_alone:
        audited = module()
        load_training_weights(audited, read_checkpoint(path))
        assert torch.equal(weights(audited), kept.last)
        assert torch.equal(vector(trained_weights(read_checkpoint(path))), kept.last)
    table = loaded.draws.proposal.table
    assert torch.equal(table, network.draws.proposal.table)
    assert table[2].sum() == 2 * 16 * STEPS


def test_weights_that_were_never_averaged_are_validated_as_they_train():
    seen = []
    for callbacks in ([averaging("never")], []):
        kept = Trained()
        trainer(kept, *callbacks, check_val_every_n_epoch=1, max_epochs=2).fit(module(), data())
        seen.append(torch.stack(kept.validated))
    assert torch.equal(*seen)


def test_what_samples_after_validation_gets_the_weights_that_were_validated():
    class Sampling(Trained):
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                with averaged_weights(trainer, module):
                    sampled.append(weights(module))

    for start in ("late", "never"):
        kept, sampled = Sampling(), []
        trainer(averaging(start), kept, max_epochs=2).fit(module(), data())
        assert torch.equal(torch.stack(kept.validated), torch.stack(sampled)), start


@pytest.mark.parametrize("start", ["never", "late", "ours"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end", "on_train_end"])
def test_a_run_that_is_stopped_goes_on_to_the_same_weights(start, hook, tmp_path):
    whole, stopped, again = module(), module(), module()
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer(averaging(start), **options).fit(whole, data())
    stop, path = {"on_train_batch_end": 4}.get(hook, 1), tmp_path / "stop.ckpt"
    shorter = {"max_steps": 3} if hook == "on_train_end" else {}
    with pytest.raises(StoppedError):
        trainer(averaging(start), StopAt(hook, stop, path), **(options | shorter)).fit(
            stopped, data()
        )
    trainer(averaging(start), **options).fit(again, data(), ckpt_path=path, weights_only=True)
    assert bool((weights(again) == weights(whole)).all())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_that_is_evaluated_after_a_fit_is_evaluated_with_its_own_average(
    stage, tmp_path
):
    class Seen(Trained):
        def on_validation_batch_start(self, trainer, module, *args):
            self.used = weights(module)

        on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    seen, path = Seen(), tmp_path / "early.ckpt"
    fit = trainer(averaging("at once"), seen, StopAt("on_train_batch_end", 3, path))
    with pytest.raises(StoppedError):
        fit.fit(module(), data())
    fit = trainer(averaging("at once"), seen)
    fit.fit(module(), data())
    options = {"datamodule": data()} if stage != "predict" else {}
    if stage == "predict":
        options["dataloaders"] = requests()
    getattr(fit, stage)(module(), ckpt_path=path, weights_only=True, **options)
    saved = torch.load(path, weights_only=True)
    assert torch.equal(seen.used, vector(saved["state_dict"]))
    assert not torch.equal(seen.used, vector(saved["current_model_state"]))


def test_a_fit_without_the_callback_goes_on_from_the_weights_that_train(tmp_path):
    path, first = tmp_path / "stop.ckpt", Trained()
    with pytest.raises(StoppedError):
        trainer(averaging("at once"), first, StopAt("on_train_batch_end", 3, path)).fit(
            module(), data()
        )
    found = {}
    start = type(
        "Start", (Callback,), {"on_train_start": lambda s, t, m: found.update(at=weights(m))}
    )
    with pytest.warns(UserWarning, match="add the following callbacks.*EMAWeightAveraging"):
        trainer(start()).fit(module(), data(), ckpt_path=path, weights_only=True)
    assert torch.equal(found["at"], first.last)


def test_a_callback_averages_in_a_second_fit_as_in_the_first():
    used, results = averaging("at once"), []
    for _ in range(2):
        network = module()
        trainer(used).fit(network, data())
        results.append(weights(network))
    assert torch.equal(*results)


class OtherAveraging(WeightAveraging):
    pass


def test_several_averages_are_refused():
    with pytest.raises(
        MisconfigurationException, match=r"at most one.*got EMAWeightAveraging, OtherAveraging"
    ):
        trainer(averaging("at once"), OtherAveraging()).fit(module(), data())


@pytest.mark.parametrize("start", mostly_slow(list(STARTS), QUICK))
def test_a_run_that_is_over_leaves_the_weights_of_the_run_that_it_resumes(start, tmp_path):
    whole, run = module(), trainer(averaging(start), limit_val_batches=0)
    run.fit(whole, data())
    run.save_checkpoint(tmp_path / "end.ckpt")

    resumed, again = module(), trainer(averaging(start), limit_val_batches=0)
    again.fit(resumed, data(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(weights(resumed.network), weights(whole.network))
    again.save_checkpoint(tmp_path / "again.ckpt")
    first, second = (read_checkpoint(tmp_path / f"{name}.ckpt") for name in ("end", "again"))
    assert first.keys() == second.keys()
    for found in {"state_dict", "current_model_state"} & first.keys():
        for name, value in first[found].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(second[found][name], value), (found, name)


def test_weights_that_do_not_train_are_not_rounded_by_their_average():
    model = module()
    frozen = next(iter(model.network.parameters())).requires_grad_(False)
    before = frozen.clone()
    decay = 0.9  # of which 1 - decay is no power of 2
    trainer(EMAWeightAveraging(decay=decay), limit_val_batches=0).fit(model, data())
    assert torch.equal(frozen, before)
    rounded = torch.optim.swa_utils.get_ema_avg_fn(decay)(before, before, torch.tensor(1))
    assert not torch.equal(rounded, before)
