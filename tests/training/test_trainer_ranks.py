"""``Trainer(strategy="ddp_fork", devices=2)`` against one process."""

import pytest
import torch
from lightning.pytorch import Callback
from support.networks import small_mlp
from support.points import Points, normal_points, two_classes
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader

from lightning_vr.estimators.stf import STF
from lightning_vr.training.module import DiffusionModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


POINTS = Points(normal_points(20, "points of ranks"), two_classes(20))


def module():
    return DiffusionModule(
        small_mlp(std=1.0, num_class_embeds=3),
        num_classes=2,
        target=STF("all"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )


class Save(Callback):
    """Writes what each rank saw to a file of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.seen = {"t": [], "noise": [], "index": []}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        noised = module.estimate.noised
        for name in self.seen:
            self.seen[name].append(getattr(noised, name))

    def on_train_end(self, trainer, module):
        bank = module.target.bank
        found = {name: torch.stack(values) for name, values in self.seen.items()}
        found |= {"bank": bank.rows + bank.centre, "group": bank.group, "seed": module.seed}
        found["weights"] = torch.nn.utils.parameters_to_vector(module.parameters())
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def fit(model, folder, **options):
    torch.manual_seed(5)
    trainer = quiet_trainer(Save(folder), max_epochs=1, **options)
    trainer.fit(model, DataLoader(POINTS, batch_size=5))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    fit(module(), folder, strategy="ddp_fork", devices=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_bank_filled_from_two_ranks_is_the_training_set_in_its_order(results):
    for found in results:
        torch.testing.assert_close(found["bank"], POINTS.x0)
        assert found["group"].tolist() == [i % 2 for i in range(20)]


def test_a_bank_filled_from_two_ranks_is_that_of_one_process(results, tmp_path):
    fit(module(), tmp_path)
    alone = torch.load(tmp_path / "0.pt", weights_only=True)
    for found in results:
        assert torch.equal(found["bank"], alone["bank"])
        assert torch.equal(found["group"], alone["group"])


def test_ranks_share_the_seed_and_draw_different_times_and_noise(results):
    first, second = results
    assert first["seed"] == second["seed"] == 5
    assert len(first["t"]) == 2
    assert not torch.isin(first["t"], second["t"]).any()
    assert not torch.isin(first["noise"], second["noise"]).any()


def test_two_ranks_train_as_one_process_on_the_whole_batch_with_their_draws(results, monkeypatch):
    model = module()
    model.seed = 5
    model.target.fill(POINTS.x0, torch.arange(20) % 2, indexed=True)
    for step in range(2):
        losses = []
        for rank, found in enumerate(results):
            index = found["index"][step]
            batch = {"x0": POINTS.x0[index], "label": index % 2, "index": index}
            monkeypatch.setattr("lightning_vr.core.keyed_module.rank", lambda rank=rank: rank)
            losses.append(model.loss(batch, model.generator("train", step, 0)).loss)
        model.zero_grad()
        (0.5 * (losses[0] + losses[1])).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    weights = torch.nn.utils.parameters_to_vector(model.parameters())
    for found in results:
        torch.testing.assert_close(found["weights"], weights, rtol=1e-5, atol=1e-6)
