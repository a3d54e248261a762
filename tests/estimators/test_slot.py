"""What draws have learned is in the checkpoint; a checkpoint of other draws leaves them alone."""

import functools

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_vr.core.rng import generator
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import IID
from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.training.module import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

POINTS = torch.randn(32, 2, generator=generator("points of slots"))


def module(draws):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP(2, width=8, depth=1)
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    return DiffusionModule(network, draws=draws, optimizer=optimizer)


def learning(bins=2):
    return CARV(4, LearnedProposal(bins=bins))


def fit(model, epochs, checkpoint=None):
    torch.manual_seed(5)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(POINTS, batch_size=8), ckpt_path=checkpoint, weights_only=True)
    return trainer


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """One epoch of training with draws, and its checkpoint."""
    folder = tmp_path_factory.mktemp("slots")

    @functools.cache
    def checkpoint(name):
        model = module(DRAWS[name]())
        fit(model, 1).save_checkpoint(folder / f"{name}.ckpt", weights_only=False)
        return folder / f"{name}.ckpt", model

    return checkpoint


DRAWS = {
    "iid": IID,
    "carv": lambda: CARV(4),
    "learned": learning,
    "more-bins": lambda: learning(4),
}


def same(first, second):
    if isinstance(first, dict):
        alike = first.keys() == second.keys()
        return alike and all(same(x, second[name]) for name, x in first.items())
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_training_that_resumes_has_the_table_of_training_that_did_not_stop(checkpoint_of):
    path, stopped = checkpoint_of("learned")
    resumed, whole = module(learning()), module(learning())
    fit(resumed, 3, path)
    fit(whole, 3)
    assert stopped.draws.proposal.table[2].sum() == 4 * 32
    assert whole.draws.proposal.table[2].sum() == 3 * 4 * 32
    assert same(resumed.draws.state_dict(), whole.draws.state_dict())
    assert same(resumed.network.state_dict(), whole.network.state_dict())


def test_a_learned_table_reloads(checkpoint_of):
    path, trained = checkpoint_of("learned")
    again = DiffusionModule.load_from_checkpoint(path)
    assert isinstance(again.draws.proposal, LearnedProposal)
    assert again.draws.proposal.table[0].all()
    assert same(again.state_dict(), trained.state_dict())


OTHERS = [
    ("iid", "learned"),
    ("carv", "learned"),
    ("more-bins", "learned"),
    ("learned", "more-bins"),
    ("learned", "iid"),
    ("learned", "carv"),
    ("iid", "carv"),
    ("carv", "iid"),
]


STARTS_ANEW = {
    ("learned", "more-bins"): (
        "LearnedProposal: `bins` is 4, the checkpoint's table has 2: the table is dropped, and "
        "learning starts anew."
    ),
    ("more-bins", "learned"): (
        "LearnedProposal: `bins` is 2, the checkpoint's table has 4: the table is dropped, and "
        "learning starts anew."
    ),
    ("learned", "iid"): (
        "IID: the checkpoint was written with a different estimator or proposal in this slot: what "
        "that one learned is dropped, and IID starts as it was built."
    ),
    ("learned", "carv"): (
        "CARV: the checkpoint was written with a different estimator or proposal in this slot: "
        "what that one learned is dropped, and CARV starts as it was built."
    ),
    ("iid", "learned"): (
        "CARV: the checkpoint was written with a different estimator or proposal in this slot: "
        "CARV starts as it was built."
    ),
}


@pytest.mark.parametrize(("saved", "built"), STARTS_ANEW)
def test_a_checkpoint_whose_learned_state_does_not_fit_warns_once(
    saved, built, checkpoint_of, caplog
):
    path, _ = checkpoint_of(saved)
    model = module(DRAWS[built]())
    caplog.clear()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert messages(caplog) == [STARTS_ANEW[saved, built]]


@pytest.mark.parametrize("name", ["iid", "carv", "learned"])
def test_a_checkpoint_of_the_same_draws_loads_without_a_warning(name, checkpoint_of, caplog):
    path, _ = checkpoint_of(name)
    model = module(DRAWS[name]())
    caplog.clear()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert messages(caplog) == []


def test_a_table_of_another_moment_is_dropped_with_a_warning(caplog):
    learned, other = (LearnedProposal(moment, bins=2) for moment in ("loss", "gradient"))
    learned.observe(torch.tensor([0.2, 0.7]), torch.ones(2), torch.ones(2))
    learned.advance()
    other.load_state_dict(learned.state_dict())
    assert not other.table.any()
    assert messages(caplog) == [
        "LearnedProposal: `moment` is 'gradient', the checkpoint's table is of 'loss': the table "
        "is dropped, and learning starts anew."
    ]


@pytest.mark.parametrize(
    ("options", "chosen"), [({"max_resamples": 4}, 4), ({"antithetic": True}, 6)]
)
def test_a_choice_of_pilots_that_is_out_of_bounds_is_told(options, chosen, caplog):
    saved, built = CARV("auto"), CARV("auto", **options)
    saved.chosen = 7
    for draws in (CARV("auto"), built):
        draws.load_state_dict(saved.state_dict())
    assert built.chosen == chosen
    (message,) = messages(caplog)
    assert "the checkpoint's pilots chose K = 7" in message
    assert f"K = {chosen} until the next pilot" in message


def test_the_state_within_an_accumulation_window_is_the_mean_over_the_ranks():
    learned = LearnedProposal(bins=2)
    learned.observe(torch.tensor([0.2, 0.7]), torch.ones(2), torch.ones(2))
    learned.advance()
    learned.observe(torch.tensor([0.2, 0.2]), torch.ones(2), torch.ones(2))
    table, observed = learned.table.clone(), learned.observed.clone()
    state = learned.state_over_ranks(lambda x: x / 2)
    assert torch.equal(state["observed"], observed / 2)
    assert torch.equal(learned.observed, observed)
    again = LearnedProposal(bins=2)
    again.set_extra_state(state)
    assert torch.equal(again.table, table)
    assert torch.equal(again.observed, observed / 2)


def messages(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "lightning_vr.estimators.slot"
    ]


@pytest.mark.parametrize(("saved", "built"), OTHERS)
def test_a_checkpoint_of_other_draws_loads_and_leaves_them_as_built(saved, built, checkpoint_of):
    path, trained = checkpoint_of(saved)
    again = DiffusionModule.load_from_checkpoint(path, draws=DRAWS[built]())
    assert same(again.draws.state_dict(), DRAWS[built]().state_dict())
    assert same(again.network.state_dict(), trained.network.state_dict())
    assert type(again.draws) is type(DRAWS[built]())


@pytest.mark.parametrize(("saved", "built"), OTHERS)
def test_training_goes_on_with_other_draws(saved, built, checkpoint_of):
    path, trained = checkpoint_of(saved)
    model = module(DRAWS[built]())
    trainer = fit(model, 2, path)
    assert trainer.global_step == 8
    assert model.seed == trained.seed
    if built == "learned":
        # from an empty table: the draws of the second epoch alone
        assert model.draws.proposal.table[2].sum() == 4 * 32


def test_a_state_of_other_draws_is_neither_missing_nor_unexpected(checkpoint_of):
    saved = torch.load(checkpoint_of("learned")[0], weights_only=True)["state_dict"]
    assert "draws.proposal._extra_state" in saved
    draws, before = CARV(4), dict(saved)
    found = module(draws).load_state_dict(saved)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert saved.keys() == before.keys()


def test_weights_of_the_network_are_still_checked(checkpoint_of):
    saved = torch.load(checkpoint_of("learned")[0], weights_only=True)["state_dict"]
    del saved["network.project_in.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*network.project_in.weight"):
        module(IID()).load_state_dict(saved)
