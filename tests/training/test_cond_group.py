"""Numbers of conditions on their way from ``encode`` to the target."""

import pytest
import torch
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_vr import CARV, STF, Clean, DiffusionModule, ResidualMLP, TargetVariance
from lightning_vr.core.rng import generator
from lightning_vr.estimators.draws import IID
from lightning_vr.training.checks import check_clean

NUMBER = torch.tensor([3, 1, 3, 0])


def samples(**options):
    return Clean(torch.randn(4, 2), cond={"flip": NUMBER[:, None]}, cond_group=NUMBER, **options)


def test_rows_and_draws_of_samples_carry_the_numbers_of_their_conditions():
    module = DiffusionModule(ResidualMLP(2, width=4))
    assert samples().rows(slice(1, 3)).cond_group.tolist() == [1, 3]
    assert samples().repeated(2).cond_group.tolist() == [3, 3, 1, 1, 3, 3, 0, 0]
    for draws in (IID(), CARV(1), CARV(2)):
        noised = draws(samples(), module.objective, generator(0))
        count = draws.draws_per_sample
        assert noised.cond_group.tolist() == NUMBER.repeat_interleave(count).tolist()
        assert noised.cond["flip"][:, 0].tolist() == noised.cond_group.tolist()


def test_labels_are_classes_alone_or_classes_and_numbers_next_to_each_other():
    group = torch.arange(4)
    assert Clean(torch.randn(4, 2)).labels is None
    assert Clean(torch.randn(4, 2), group).labels is group
    assert samples().labels.tolist() == [[3], [1], [3], [0]]
    assert samples(group=group).labels.tolist() == [[0, 3], [1, 1], [2, 3], [3, 0]]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (NUMBER[:3], r"`cond_group` must be integers of shape \(4,\), .* got .* shape \(3,\)"),
        (NUMBER.float(), r"`cond_group` must be integers .* got torch.float32"),
        (NUMBER - 1, "`cond_group` must be at least 0, got -1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        check_clean(Clean(torch.randn(4, 2), cond_group=numbers), None)


class Flips(Dataset):
    """Each sample stands there twice: as it is and mirrored."""

    x0 = torch.randn(12, 2, generator=generator("flips"))

    def __len__(self):
        return 24

    def __getitem__(self, i):
        x0 = self.x0[i // 2]
        return {"x0": x0.flip(0) if i % 2 else x0, "label": i // 2 % 3, "index": i}


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, t, class_labels=None, flip=None):
        return self.linear(torch.cat([x, flip], dim=1))


class Augmented(DiffusionModule):
    def encode(self, batch):
        number = batch["index"] % 2
        cond = {"flip": number[:, None].float()}
        return Clean(batch["x0"], batch["label"], cond, batch["index"], number)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_run_fills_the_bank_with_classes_and_numbers_and_measures_with_both(
    num_classes, tmp_path
):
    module = Augmented(Conditional(), num_classes=num_classes, target=STF("all"))
    callback = TargetVariance(noise_levels=3, samples=64)
    trainer = quiet_trainer(callback, max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(module, DataLoader(Flips(), batch_size=8))
    index = torch.arange(24)
    classes = [] if num_classes is None else [index // 2 % 3]
    assert torch.equal(module.target.bank.group, torch.stack([*classes, index % 2], dim=1))
    # at the highest level every reference counts that is not masked
    ess = callback.curve.ess[24].mean[-1]
    assert 0.7 < float(ess) / (12 if num_classes is None else 4) <= 1
    # each row of the last batch uses some of the others
    assert float(module.estimate.target.ess.max()) > 1
