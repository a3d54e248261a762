"""What `sample` takes: whose noise, which labels, which shape; the rest is refused in words."""

import copy
import math

import numpy
import pytest
import torch
from lightning.pytorch import Callback
from support.networks import small_mlp
from support.points import Points, normal_points, two_classes
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr.core.rng import generator
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.sampling import Sampler
from lightning_vr.process.solvers import Euler
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.module import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

FAST = Sampler(Euler(), steps=2)


def module(kind=DiffusionModule, **options):
    settings = {"num_classes": 2, "label_dropout": 0.1, "sampler": FAST}
    made = kind(small_mlp(std=0.1, num_class_embeds=3), **settings | options)
    made.seed, made.sample_shape = 7, (2,)
    return made


def plain(kind=DiffusionModule, **options):
    made = kind(small_mlp(std=0.1), sampler=FAST, **options)
    made.seed, made.sample_shape = 7, (2,)
    return made


class Captioned(nn.Module):
    """A network with a further condition."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, t, class_labels=None, text=None):
        return self.linear(x) + text


def loader():
    return DataLoader(Points(normal_points(16, "points"), two_classes(16)), batch_size=8)


class SamplesEachBatch(Callback):
    def __init__(self):
        self.samples = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.samples.append(module.sample(2))


class TestNoise:
    @pytest.mark.parametrize("kind", [Diffusion, DiffusionModule])
    def test_each_call_gives_other_samples_and_a_second_run_the_same(self, kind):
        first, second = plain(kind), plain(kind)
        samples = [first.sample(3) for _ in range(4)]
        values = torch.stack(samples).flatten()
        assert len(values.unique()) == len(values)
        assert all(torch.equal(second.sample(3), each) for each in samples)

    def test_a_seed_or_a_source_gives_the_same_again_and_leaves_other_calls_alone(self):
        model, other = plain(), plain()
        by_seed = [model.sample(3, seed=5) for _ in range(2)]
        by_source = [model.sample(3, source=generator(5)) for _ in range(2)]
        assert torch.equal(*by_seed)
        assert torch.equal(*by_source)
        assert not torch.equal(model.sample(3, seed=6), by_seed[0])
        assert torch.equal(model.sample(3), other.sample(3))
        assert model.sample_calls == other.sample_calls == 1

    def test_ranks_draw_different_noise_also_with_one_seed(self, monkeypatch):
        drawn = []
        for rank in (0, 1):
            monkeypatch.setattr("lightning_vr.core.keyed_module.rank", lambda rank=rank: rank)
            drawn += [plain().sample(3), plain().sample(3, seed=5)]
        values = torch.stack(drawn).flatten()
        assert len(values.unique()) == len(values)

    def test_sampling_in_training_does_not_change_it(self):
        weights = []
        for callbacks in ([], [SamplesEachBatch()]):
            model = plain()
            quiet_trainer(*callbacks, max_epochs=1).fit(model, loader())
            weights.append(model.state_dict())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def test_a_resumed_run_goes_on_with_the_samples_of_the_uninterrupted_one(self, tmp_path):
        def fit(epochs, checkpoint=None):
            seen, trainer = SamplesEachBatch(), None
            trainer = quiet_trainer(seen, max_epochs=epochs)
            trainer.fit(plain(), loader(), ckpt_path=checkpoint, weights_only=True)
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            return seen.samples

        whole = fit(2)
        parts = fit(1) + fit(2, tmp_path / "last.ckpt")
        assert len(whole) == len(parts) == 4
        assert all(map(torch.equal, whole, parts))

    def test_a_loaded_module_does_not_repeat_the_samples_of_its_run(self, tmp_path):
        seen = SamplesEachBatch()
        trainer = quiet_trainer(seen, max_epochs=1)
        model = plain()
        trainer.fit(model, loader())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        again = DiffusionModule.load_from_checkpoint(tmp_path / "last.ckpt")
        again.seed = model.seed
        assert again.sample_calls == 2
        assert torch.equal(again.sample(3), copy.deepcopy(model).sample(3))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"seed": -1}, "`seed` must be at least 0, got -1"),
            ({"seed": 1.5}, "`seed` must be a whole number .* got 1.5"),
            ({"seed": True}, "`seed` must be a whole number .* got True"),
            ({"seed": 1, "source": generator(0)}, "`seed` must be None where `source` is given"),
            ({"source": 3}, "`source` must be a torch.Generator, got int: use one, as torch"),
        ],
    )
    def test_what_gives_no_noise_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            plain().sample(2, **options)


class TestLabels:
    @pytest.mark.parametrize(
        "group",
        [
            [0, 1, 1],
            (0, 1, 1),
            numpy.array([0, 1, 1]),
            torch.tensor([0, 1, 1], dtype=torch.uint8),
            torch.tensor([0, 1, 1], dtype=torch.int32),
        ],
        ids=lambda group: str(getattr(group, "dtype", type(group).__name__)),
    )
    def test_integers_of_any_kind_are_labels(self, group):
        expected = module().sample(3, group=torch.tensor([0, 1, 1]), seed=0)
        assert torch.equal(module().sample(3, group=group, seed=0), expected)
        assert not torch.equal(module().sample(3, group=[1, 0, 1], seed=0), expected)

    @pytest.mark.parametrize(
        ("group", "message"),
        [
            ([0], r"integers of shape \(3,\), .* shape \(1,\)"),
            ([0, 1, 1, 0], r"integers of shape \(3,\), .* shape \(4,\)"),
            (1, r"integers of shape \(3,\), .* shape \(\)"),
            ([[0], [1], [1]], r"integers of shape \(3,\), .* shape \(3, 1\)"),
            ([0, 1, 2], r"in \[0, 2\), as `num_classes` says, .* the first at index 2"),
            ([0, -1, 1], r"in \[0, 2\), as `num_classes` says, .* the first at index 1"),
            ([0.0, 1.0, 1.0], r"integers of shape \(3,\), .* got torch.float32"),
            ([True, False, True], r"integers in \[0, 2\), got true and false: give numbers"),
            ([None, 1, 1], r"3 integers in \[0, 2\), got list: give a list or a tensor"),
            ("011", r"3 integers in \[0, 2\), got str: give a list or a tensor"),
            ({"label": [0, 1, 1]}, r"3 integers in \[0, 2\), got dict: give a list or a tensor"),
            ([[0], [1, 1]], r"3 integers in \[0, 2\), got list: give a list or a tensor"),
        ],
    )
    def test_wrong_labels_are_told_as_such(self, group, message):
        with pytest.raises(ValueError, match=f"^`group` must be {message}"):
            module().sample(3, group=group)

    def test_labels_for_a_model_without_classes_are_refused(self):
        with pytest.raises(ValueError, match="`group` must be None without classes"):
            plain().sample(2, group=[0, 0])

    def test_samples_without_a_class_need_a_network_that_has_seen_dropped_labels(self):
        assert module().sample(3).shape == (3, 2)
        with pytest.raises(ValueError, match=r"`group` must be given, .* \(`label_dropout` is 0\)"):
            module(label_dropout=0.0).sample(3)


class TestGuidance:
    @pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
    @pytest.mark.parametrize(("label_dropout", "labels"), [(0.0, "dropped"), (1.0, "seen")])
    def test_guidance_by_labels_that_training_lacks_is_refused(
        self, guidance, label_dropout, labels
    ):
        sampler = Sampler(steps=2, guidance=guidance)
        message = f"`guidance` must be 1 if labels are never {labels} .* got {guidance:g}: train"
        with pytest.raises(ValueError, match=message):
            module(label_dropout=label_dropout, sampler=sampler)
        with pytest.raises(ValueError, match=message):
            module(label_dropout=label_dropout).sample(2, group=[0, 1], sampler=sampler)
        module(label_dropout=label_dropout).sample(2, group=[0, 1], sampler=FAST)

    def test_guidance_without_classes_is_refused_where_it_is_given(self):
        with pytest.raises(ValueError, match="`guidance` must be 1 without classes and"):
            plain().sample(2, sampler=Sampler(guidance=2.0))

    @pytest.mark.parametrize("group", [None, [0, 1]])
    def test_guidance_that_cannot_leave_the_condition_out_is_refused(self, group):
        model = Diffusion(Captioned(), num_classes=2, label_dropout=0.1, sampler=FAST)
        options = {"shape": (2,), "group": group, "cond": {"text": torch.ones(2, 2)}}
        assert model.sample(2, **options).shape == (2, 2)
        with pytest.raises(ValueError, match="`null_cond` must be given to leave out"):
            model.sample(2, sampler=Sampler(guidance=2.0), **options)


class TestShape:
    @pytest.mark.parametrize("count", [0, -1, 2.0, True, None, "3", math.nan])
    def test_a_count_that_is_none_is_refused(self, count):
        with pytest.raises(ValueError, match=r"^`count` must be (a whole number of )?at least 1"):
            plain().sample(count)

    @pytest.mark.parametrize("batch_size", [0, -1, 2.5, None])
    def test_a_batch_size_that_is_none_is_refused(self, batch_size):
        with pytest.raises(ValueError, match=r"^`batch_size` must be .*at least 1"):
            plain().sample(2, batch_size=batch_size)

    @pytest.mark.parametrize("shape", [(), 2, (0,), (-2,), (2.0,), "2", (None,), {"x": 2}])
    @pytest.mark.parametrize("known", [None, (2,)])
    def test_a_shape_that_is_none_is_refused(self, shape, known):
        model = plain()
        model.sample_shape = known
        with pytest.raises(ValueError, match=r"^`shape` must be the positive sizes of one sample"):
            model.sample(2, shape=shape)

    @pytest.mark.parametrize("shape", [(3,), (2, 1), [1, 2]])
    def test_a_shape_unlike_the_data_is_refused(self, shape):
        with pytest.raises(ValueError, match=r"`shape` must be like the training data's, \(2,\)"):
            plain().sample(2, shape=shape)

    def test_without_data_the_shape_must_be_given(self):
        model = Diffusion(ResidualMLP(width=8), sampler=FAST)
        with pytest.raises(ValueError, match="`shape` must be given until the model has seen"):
            model.sample(2)
        assert model.sample(2, shape=[2]).shape == (2, 2)
        assert model.sample(2, shape=torch.Size([2])).shape == (2, 2)

    @pytest.mark.parametrize("shape", [(3,), (2, 2), (4, 2)])
    def test_a_shape_that_the_network_does_not_take_is_refused(self, shape):
        model = Diffusion(ResidualMLP(width=8), sampler=FAST)
        with pytest.raises(ValueError, match=r"`network` must take .* the shape of the data"):
            model.sample(4, shape=shape)

    @pytest.mark.parametrize(
        ("cond", "message"),
        [
            ({"text": torch.ones(4, 2)}, "`cond` must have one row, or 3 .* got 4 in 'text'"),
            ({"text": torch.tensor(1.0)}, "`cond` must have one row, or 3 .* got none in 'text'"),
            ({"text": "abc"}, "`cond` must hold tensors, got str as 'text'"),
            (torch.ones(3, 2), "`cond` must be a dictionary .* got Tensor"),
        ],
    )
    def test_a_condition_without_a_row_for_each_sample_is_refused(self, cond, message):
        with pytest.raises(ValueError, match=message):
            Diffusion(Captioned(), sampler=FAST).sample(3, shape=(2,), cond=cond)


@pytest.mark.gpu
def test_labels_and_conditions_go_to_the_models_device_and_sources_must_be_there():
    model = Diffusion(Captioned(), num_classes=2, label_dropout=0.1, sampler=FAST).cuda()
    cond = {"text": torch.ones(3, 2)}
    samples = model.sample(3, group=torch.tensor([0, 1, 1]), cond=cond, shape=(2,))
    assert samples.is_cuda
    with pytest.raises(ValueError, match=r"`source` must be on the model's device, cuda:0, .* cpu"):
        model.sample(3, cond=cond, shape=(2,), source=generator(0))
