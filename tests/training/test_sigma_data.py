import math

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_vr import EMA
from lightning_vr.auditing import audit
from lightning_vr.callbacks import GradientVariance, TargetVariance
from lightning_vr.core.types import Clean
from lightning_vr.data import TwoGaussians
from lightning_vr.process.weightings import EDMWeighting, UnitWeighting
from lightning_vr.training import DiffusionModule
from tests.support.networks import small_mlp
from tests.support.trainers import quiet_trainer

SIGMA = 1.7


class Known(LightningDataModule):
    """Points in the plane whose standard deviation the data module knows."""

    def __init__(self, sigma_data=SIGMA):
        super().__init__()
        if sigma_data is not None:
            self.sigma_data = sigma_data

    def train_dataloader(self):
        return DataLoader([{"x0": torch.randn(2)} for _ in range(8)], batch_size=4)

    val_dataloader = train_dataloader


class Fixed(DiffusionModule):
    """Has no argument ``sigma_data`` of its own."""

    def __init__(self, width=8):
        super().__init__(small_mlp(width), sigma_data="auto")


class Encoding(DiffusionModule):
    def encode(self, batch):
        return Clean(0.18 * batch["x0"])


def auto(**options):
    return DiffusionModule(small_mlp(), sigma_data="auto", **options)


def trained(module, data=None, *callbacks, **options):
    trainer = quiet_trainer(*callbacks, **({"max_steps": 2, "limit_val_batches": 1} | options))
    trainer.fit(module, datamodule=data or Known())
    return trainer


@pytest.fixture
def checkpoint(tmp_path):
    trained(auto()).save_checkpoint(tmp_path / "auto.ckpt")
    return tmp_path / "auto.ckpt"


def test_auto_trains_as_the_number_of_the_data_module_does():
    data = TwoGaussians(16, dimension=2, mean=2.0, num_samples=64, num_validation=32)
    data.setup()
    found, given = auto(), DiffusionModule(small_mlp(), sigma_data=data.sigma_data)
    for module in (found, given):
        trained(module, TwoGaussians(16, dimension=2, mean=2.0, num_samples=64, num_validation=32))
    assert found.sigma_data == data.sigma_data
    for name, weight in given.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight)


def test_number_reaches_the_objective_and_the_default_weight_alone():
    module, weighted = auto(), auto(weighting=EDMWeighting(0.3))
    for one in (module, weighted):
        trained(one)
        assert one.objective.sigma_data == SIGMA
    t = torch.linspace(0.1, 3, 5)
    expected = UnitWeighting("edm", SIGMA)(module.schedule, t)
    assert torch.equal(module.weighting(module.schedule, t), expected)
    assert weighted.weighting.sigma_data == 0.3


@pytest.mark.parametrize("kind", [auto, Fixed])
def test_checkpoint_and_hyperparameters_hold_the_number(tmp_path, kind):
    module = kind()
    trained(module).save_checkpoint(tmp_path / "x.ckpt")
    loaded = DiffusionModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.sigma_data == loaded.objective.sigma_data == SIGMA
    if kind is auto:
        kept = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
        assert kept["sigma_data"] == SIGMA
        assert module.hparams.sigma_data == module.hparams_initial.sigma_data == SIGMA
        assert loaded.hparams.sigma_data == SIGMA


def test_number_given_at_loading_wins(checkpoint):
    assert DiffusionModule.load_from_checkpoint(checkpoint, sigma_data=0.9).sigma_data == 0.9


@pytest.mark.parametrize("now", [2 * SIGMA, None])
def test_resumed_run_keeps_the_number_of_its_checkpoint(checkpoint, now):
    module = auto()
    trainer = quiet_trainer(max_steps=4, limit_val_batches=0)
    trainer.fit(module, datamodule=Known(now), ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == 4
    assert module.sigma_data == module.hparams.sigma_data == SIGMA


def test_validation_alone_takes_the_number_of_the_data():
    module = auto()
    quiet_trainer(limit_val_batches=1).validate(module, datamodule=Known(), verbose=False)
    assert module.sigma_data == SIGMA


@pytest.mark.usefixtures("no_pictures")
def test_callbacks_and_averages_find_the_number():
    module, average = auto(), EMA(decay=0.5)
    variance = GradientVariance(every_n_steps=1, samples=2), TargetVariance(samples=64)
    trained(module, TwoGaussians(16, dimension=2, num_samples=64), average, *variance)
    assert module.objective.sigma_data == pytest.approx(1, abs=0.1)


def test_audit_takes_the_number():
    module = auto()
    result = audit(module, TwoGaussians(16, dimension=2), [], budget=0.1, progress=False)
    assert result is not None
    assert module.sigma_data == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Known(None), "got 'auto' and a Known, which has no `sigma_data`: give the standard"),
        (Known(0.0), "`sigma_data` of Known must be positive and finite .* got 0.0"),
        (Known(math.nan), "must be positive and finite .* got nan"),
        (Known("wide"), "must be positive and finite .* got 'wide'"),
    ],
)
def test_data_module_that_does_not_know_is_refused_at_setup(data, message):
    with pytest.raises(ValueError, match=message):
        trained(auto(), data)


def test_loaders_without_a_data_module_are_refused():
    trainer, loader = quiet_trainer(max_steps=1), Known().train_dataloader()
    with pytest.raises(ValueError, match="'auto' and a trainer without a data module"):
        trainer.fit(auto(), loader, loader)


def test_use_before_setup_is_refused_and_never_a_guess():
    module = auto()
    assert math.isnan(module.sigma_data)
    assert module.hparams.sigma_data == "auto"
    with pytest.raises(ValueError, match="'auto' and a module that no trainer has set up"):
        module.loss({"x0": torch.randn(4, 2)}, torch.Generator())


def test_auto_is_refused_where_encode_changes_the_samples():
    with pytest.raises(ValueError, match="must be a number where `encode` is overridden, got"):
        Encoding(small_mlp(), sigma_data="auto")


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="must be a number or 'auto', got 'wide'"):
        DiffusionModule(small_mlp(), sigma_data="wide")
