from types import SimpleNamespace

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch

from lightning_vr.data import (
    Checkerboard,
    Digits,
    EightGaussians,
    HuggingFaceImages,
    ImageFolder,
    Moons,
    TwoGaussians,
)
from lightning_vr.data.datamodule import stratified_split

IN_MEMORY = [Digits, EightGaussians, TwoGaussians, Moons, Checkerboard]


@pytest.fixture(params=IN_MEMORY, ids=lambda kind: kind.__name__)
def datamodule(request):
    datamodule = request.param(batch_size=100)
    datamodule.setup()
    return datamodule


def test_index_of_a_sample_is_its_position_in_its_own_set(datamodule):
    for data in (datamodule.train_dataset, datamodule.validation_dataset):
        assert [int(data[index]["index"]) for index in range(len(data))] == list(range(len(data)))


def test_training_batches_are_the_rows_their_index_names(datamodule):
    data = datamodule.train_dataset
    seen = []
    for batch in datamodule.train_dataloader():
        assert batch[data.key].shape == (100, *datamodule.shape)
        assert batch[data.key].dtype == torch.float32
        assert torch.equal(batch[data.key], data.x[batch["index"]])
        assert torch.equal(batch["label"], data.label[batch["index"]])
        seen.append(batch["index"])

    seen = torch.cat(seen)
    assert len(seen.unique()) == len(seen) == len(data) // 100 * 100
    assert not torch.equal(seen, seen.sort().values)


def test_validation_and_test_batches_are_the_whole_validation_set_in_order(datamodule):
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        index = torch.cat([batch["index"] for batch in loader])
        assert torch.equal(index, torch.arange(len(datamodule.validation_dataset)))


def test_labels_are_all_classes(datamodule):
    label = datamodule.train_dataset.label
    assert label.unique().tolist() == list(range(datamodule.num_classes))


def test_sigma_data_is_the_standard_deviation_of_the_training_data(datamodule):
    x = datamodule.train_dataset.x.double().numpy()
    assert datamodule.sigma_data == pytest.approx(x.std(), rel=1e-9)


def test_seed_decides_the_data(datamodule):
    kind = type(datamodule)
    same, other = kind(seed=0), kind(seed=1)
    same.setup()
    other.setup()
    assert torch.equal(same.train_dataset.x, datamodule.train_dataset.x)
    assert torch.equal(same.validation_dataset.x, datamodule.validation_dataset.x)
    assert not torch.equal(other.train_dataset.x, datamodule.train_dataset.x)


def test_data_are_built_once(datamodule):
    before = datamodule.train_dataset
    datamodule.setup("validate")
    assert datamodule.train_dataset is before


def test_building_data_leaves_the_global_generator_alone(datamodule):
    state = torch.get_rng_state()
    fresh = type(datamodule)()
    fresh.setup()
    assert fresh.sigma_data > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["train_dataset", "validation_dataset", "sigma_data"])
def test_what_needs_the_data_says_so_before_setup(name):
    with pytest.raises(RuntimeError, match=f"`{name}` is known after `setup`"):
        getattr(Moons(), name)


def test_batch_larger_than_the_training_set_is_refused():
    message = (
        "`batch_size` must be between 1 and 1437, the size of the training set, got 5000: use a"
        " smaller batch."
    )
    with pytest.raises(ValueError, match=message):
        Digits(batch_size=5000).setup()


def test_batch_as_large_as_the_training_set_is_one_batch():
    datamodule = Digits(batch_size=1437)
    datamodule.setup()
    assert len(datamodule.train_dataloader()) == 1


def test_batch_larger_than_the_samples_of_a_process_is_refused():
    datamodule = Moons(num_samples=1000, batch_size=600)
    datamodule.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match=r"between 1 and 500, .* divided by 2 processes, got 600"):
        datamodule.setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused_when_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_stratified_split_puts_each_sample_into_one_part():
    label = torch.tensor([0] * 50 + [1] * 30 + [2] * 23)
    train, held_out = stratified_split(label, 0.2, seed=0)
    assert len(held_out) == 21
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(103))


@pytest.mark.parametrize("seed", range(5))
def test_stratified_split_holds_out_the_same_fraction_of_each_class(seed):
    label = torch.tensor([0] * 50 + [1] * 30 + [2] * 23)
    _, held_out = stratified_split(label, 0.2, seed)
    fraction = label[held_out].bincount() - 0.2 * label.bincount()
    assert fraction.abs().max() <= 1.05


def test_stratified_split_holds_out_each_sample_equally_often():
    label = torch.tensor([0] * 7 + [1] * 5)
    times = torch.zeros(12)
    for seed in range(2000):
        times[stratified_split(label, 0.25, seed)[1]] += 1
    for group in (times[:7], times[7:]):
        fraction = group.mean() / 2000
        error = (fraction * (1 - fraction) / 2000).sqrt()
        assert ((group / 2000 - fraction).abs() / error).max() < 4


def test_stratified_split_follows_its_seed():
    label = torch.zeros(100)
    assert torch.equal(stratified_split(label, 0.1, 3)[1], stratified_split(label, 0.1, 3)[1])
    assert not torch.equal(stratified_split(label, 0.1, 3)[1], stratified_split(label, 0.1, 4)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 0.95, float("nan")])
def test_split_with_an_empty_part_is_refused(fraction):
    with pytest.raises(ValueError, match=f"got {fraction} of 10 samples"):
        stratified_split(torch.zeros(10), fraction, seed=0)


@pytest.mark.parametrize("kind", [*IN_MEMORY, ImageFolder, HuggingFaceImages])
def test_every_argument_is_a_documented_primitive_of_the_command_line(kind):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "data")
    options = [action for action in parser._actions if action.dest.startswith("data.")]
    assert {"data.batch_size", "data.num_workers", "data.seed"} <= {a.dest for a in options}
    for option in options:
        assert option.help
        assert option.help.strip(), option.dest

    given = ["--data.path=somewhere", "--data.size=8"] if kind not in IN_MEMORY else []
    config = parser.parse_args([*given, "--data.batch_size=7"])
    assert kind(**config.data.as_dict()).batch_size == 7


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch["index"])
        return self.layer(batch["x0"]).square().mean()

    def validation_step(self, batch, _):
        self.log("loss", self.layer(batch["x0"]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_trainer_fits_on_a_data_module(tmp_path):
    module = Regression()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=Moons(batch_size=64, num_samples=200, num_validation=50))
    assert len(torch.cat(module.seen).unique()) == 192
