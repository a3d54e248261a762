import copy
import math
import threading
from dataclasses import replace

import diffusers
import pytest
import torch
from lightning.pytorch import Callback
from support.networks import small_mlp, small_unet
from support.points import Points, normal_points, two_classes
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_vr.core.rng import generator
from lightning_vr.core.types import UNLABELLED, Clean
from lightning_vr.estimators.draws import noise_samples
from lightning_vr.estimators.loss import ControlVariate, diffusion_loss, network_output
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM
from lightning_vr.process.networks import ResidualMLP
from lightning_vr.process.objective import Objective
from lightning_vr.process.sampling import Sampler, evaluating
from lightning_vr.process.schedules import EDM, VP
from lightning_vr.process.solvers import DDIM, RK45
from lightning_vr.process.timesteps import Uniform
from lightning_vr.process.weightings import EDMWeighting, UnitWeighting
from lightning_vr.training.module import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def points(x0=None, label=None, offset=0):
    """Points in the plane around ±1, with labels and indices."""
    drawn = two_classes(32)
    around = (2.0 * drawn[:, None] - 1) + 0.3 * normal_points(32, "points")
    return Points(around if x0 is None else x0, drawn if label is None else label, offset)


class Plain(nn.Module):
    """A network that knows nothing of us."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, t):
        return self.linear(torch.cat([x, t[:, None] / 1000], dim=1))


def network(num_class_embeds=None):
    return small_mlp(16, std=0.1, num_class_embeds=num_class_embeds)


def conditional_module(**options):
    return DiffusionModule(network(3), num_classes=2, **options)


def loader(data=None, batch_size=8, **options):
    return DataLoader(data or points(), batch_size=batch_size, **options)


class Record(Callback):
    """Keeps the loss and the draws of every micro-step."""

    def __init__(self):
        self.losses, self.times = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.times.append(module.estimate.noised.t.tolist())


def trainer(*callbacks, **options):
    return quiet_trainer(*callbacks, **{"max_epochs": 2} | options)


class TestRandomness:
    def train(self, seed, checkpoint=None, stop=None, epochs=4, **options):
        torch.manual_seed(seed)
        module = conditional_module(target=STF(references=8), label_dropout=0.3, **options)
        record = Record()
        fit = trainer(record, max_epochs=stop or epochs)
        fit.fit(module, loader(), ckpt_path=checkpoint, weights_only=True)
        return module, record, fit

    def test_one_seed_trains_bitwise_alike_twice_and_another_does_not(self):
        (first, a, _), (second, b, _), (_, c, _) = (self.train(seed) for seed in (1, 1, 2))
        assert a.losses == b.losses
        assert a.losses != c.losses
        for x, y in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
            assert torch.equal(x, y)

    def test_a_resumed_run_repeats_the_uninterrupted_one(self, tmp_path):
        _, whole, _ = self.train(1)
        _, before, fit = self.train(1, stop=2)
        fit.save_checkpoint(tmp_path / "two.ckpt")
        # the new process is seeded differently: the checkpoint's seed must count
        _, after, _ = self.train(77, checkpoint=tmp_path / "two.ckpt")
        assert len(whole.losses) == 16
        assert before.losses + after.losses == whole.losses

    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_run_stopped_in_mid_epoch_goes_on_with_the_draws_of_the_uninterrupted_one(
        self, tmp_path, accumulate
    ):
        """Lightning then begins the epoch's data anew; times and noise must go on all the same."""

        def times(checkpoint=None, **options):
            torch.manual_seed(1 if checkpoint is None else 77)
            record = Record()
            fit = trainer(record, accumulate_grad_batches=accumulate, **{"max_epochs": 3} | options)
            fit.fit(conditional_module(), loader(), ckpt_path=checkpoint, weights_only=True)
            fit.save_checkpoint(tmp_path / "stopped.ckpt")
            return record.times

        whole = times()
        before = times(max_steps=3)
        after = times(tmp_path / "stopped.ckpt")
        assert len(before) == 3 * accumulate
        assert before + after == whole[: len(before + after)]
        assert len(after) >= 4

    def test_every_micro_step_draws_its_own_times(self):
        record = Record()
        torch.manual_seed(0)
        trainer(record, accumulate_grad_batches=2).fit(conditional_module(), loader())
        assert len({tuple(times) for times in record.times}) == len(record.times) == 8

    def test_ranks_draw_different_times_and_noise(self, monkeypatch):
        module, batch = conditional_module(), next(iter(loader()))
        draws = []
        for rank in (0, 1):
            monkeypatch.setattr("lightning_vr.core.keyed_module.rank", lambda rank=rank: rank)
            draws.append(module.loss(batch, module.generator("train", 0, 0)).noised)
        assert not torch.isin(draws[0].t, draws[1].t).any()
        assert not torch.isin(draws[0].noise, draws[1].noise).any()

    @pytest.mark.parametrize("stage", ["validate", "test"])
    def test_noise_of_an_evaluation_is_independent_of_a_random_encode(self, stage, z_score):
        drawn = []

        class Random(DiffusionModule):
            def encode(self, batch):
                clean = super().encode(batch)
                drawn.append(torch.randn_like(clean.x0))
                return replace(clean, x0=clean.x0 + drawn[-1])

            def compute_loss(self, noised, target, **options):
                drawn.append(noised.noise)
                return super().compute_loss(noised, target, **options)

        module, many = Random(network()), Points(normal_points(2048, "many"))
        getattr(trainer(), stage)(module, DataLoader(many, 1024), verbose=False)
        own, noise = torch.cat(drawn[::2]), torch.cat(drawn[1::2])
        # every shift of one stream against the other
        for shift in range(-4, 5):
            product = own.flatten() * noise.flatten().roll(shift)
            assert abs(z_score(product)) < 4, shift

    def test_training_leaves_the_global_stream_alone(self):
        states = []

        class Watch(Callback):
            def on_train_batch_start(self, *_):
                states.append(torch.get_rng_state())

            on_train_batch_end = on_train_batch_start

        module = conditional_module(
            target=STF(references=8, min_noise_level="auto"), label_dropout=0.5
        )
        trainer(Watch(), max_epochs=1).fit(module, loader())
        assert len(states) == 8
        assert all(torch.equal(state, states[0]) for state in states)

    @pytest.mark.parametrize("conditioned", [False, True])
    def test_filling_the_bank_leaves_the_global_stream_alone_also_when_it_gives_up(
        self, conditioned
    ):
        states = []

        class Noisy(DiffusionModule):
            def encode(self, batch):
                text = {"text": torch.rand(len(batch["x0"]), 4)}
                return Clean(batch["x0"], cond=text if conditioned else None)

            def on_train_start(self):
                states.append(torch.get_rng_state())
                super().on_train_start()
                states.append(torch.get_rng_state())

            def predict(self, x, noised):
                return self.network(x, noised.t)

        module = Noisy(network(), target=STF(8))
        trainer(max_epochs=1).fit(module, loader())
        assert torch.equal(*states)
        assert (module.target.bank is None) == conditioned

    def test_validation_noise_is_the_same_in_every_epoch(self):
        module = conditional_module(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        losses = []

        class Keep(Callback):
            def on_validation_epoch_end(self, trainer, module):
                losses.append(float(trainer.callback_metrics["val/loss"]))

        trainer(Keep(), max_epochs=3, num_sanity_val_steps=0).fit(module, loader(), loader())
        assert len(losses) == 3
        assert losses[0] == losses[1] == losses[2]
        module.seed = None  # as that of a module that was loaded: the seed of the program counts
        torch.manual_seed(3)
        found = [trainer().validate(module, loader(), verbose=False) for _ in range(2)]
        module.seed = torch.initial_seed()
        assert [*found, trainer().validate(module, loader(), verbose=False)] == 3 * found[:1]

    @pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1])
    def test_any_seed_that_torch_takes_can_train(self, seed):
        torch.manual_seed(seed)
        trainer(max_epochs=1).fit(conditional_module(), loader())


class TestLoss:
    def test_the_slots_are_composed_with_the_module_as_the_network(self):
        module = conditional_module(
            schedule=VP(), prediction="v", target=STF("batch"), weighting=EDMWeighting()
        )
        batch = next(iter(loader()))
        found = module.loss(batch, generator(5))

        source = generator(5)
        clean = Clean(batch["x0"], batch["label"], index=batch["index"])
        objective = Objective(VP(), module.timesteps, EDMWeighting(), "v")
        noised = module.draws(clean, objective, source)
        expected = diffusion_loss(
            lambda x, draws: module.network(x, 1000 * draws.t, class_labels=batch["label"]),
            noised,
            STF("batch")(noised, clean, source),
            objective=objective,
        )
        torch.testing.assert_close(found.per_draw, expected.per_draw)

    def test_denoise_is_the_x0_hat_that_the_loss_compares(self, kind, schedule):
        module = DiffusionModule(
            network(), schedule, kind, weighting=UnitWeighting("x0"), timesteps=Uniform(0.2, 0.8)
        )
        found = module.loss(points().x0, generator(5), target=DSM())
        x0_hat = module.denoise(found.noised.xt, found.noised.t)
        expected = (x0_hat - found.noised.x0).square().mean(1)
        torch.testing.assert_close(found.per_draw, expected, rtol=1e-3, atol=1e-5)

    def test_a_control_variate_of_the_user_joins_the_loss(self):
        class Shift(ControlVariate):
            def forward(self, network, noised, target, objective):
                return network_output(network, noised, objective), torch.full_like(noised.t, 3.0)

        plain, shifted = DiffusionModule(network()), DiffusionModule(network())
        shifted.control_variate = Shift()
        losses = [m.loss(points().x0, generator(5)).loss for m in (plain, shifted)]
        torch.testing.assert_close(losses[1], losses[0] + 3)

    def test_it_trains_with_the_target_given_and_validates_on_the_plain_one(self):
        module = DiffusionModule(network(), target=STF("batch"))
        batch = next(iter(loader()))
        stf = module.loss(batch, generator(5))
        dsm = module.loss(batch, generator(5), target=DSM())
        assert float(stf.target.ess.max()) > 1
        assert torch.equal(dsm.target.x0, dsm.noised.x0)
        assert torch.equal(dsm.noised.xt, stf.noised.xt)

    def test_the_step_keeps_an_estimate_without_its_graph(self):
        module = conditional_module()
        trainer(max_epochs=1).fit(module, loader())
        assert not module.estimate.loss.requires_grad
        assert not module.estimate.per_draw.requires_grad
        assert module.estimate.noised.xt.shape == (8, 2)

    def test_without_classes_labels_are_ignored(self):
        module = DiffusionModule(network(), target=STF("batch"))
        assert module.clean(next(iter(loader()))).group is None
        trainer(max_epochs=1).fit(module, loader(points(label=torch.arange(32) + 100)))

    def test_under_mixed_precision_the_target_and_the_loss_are_float32(self):
        module = conditional_module(target=STF(8))
        trainer(max_epochs=1, precision="bf16-mixed").fit(module, loader())
        assert module.estimate.target.x0.dtype == torch.float32
        assert module.estimate.per_draw.dtype == torch.float32

    @pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_samples_meet_the_network_in_its_own_precision(self, precision, dtype):
        module = conditional_module(target=STF(8))
        data = points(x0=points().x0.to(dtype))
        trainer(max_epochs=1, precision=precision).fit(module, loader(data))
        assert module.estimate.target.x0.dtype in (torch.float32, torch.float64)
        assert module.sample(2, group=[0, 1]).dtype == torch.float32

    @pytest.mark.parametrize("label_dropout", [0.0, 0.25, 1.0])
    def test_labels_are_dropped_at_the_stated_rate_in_training_only(self, label_dropout):
        module = conditional_module(label_dropout=label_dropout)
        batch = Clean(torch.zeros(4000, 2), torch.ones(4000, dtype=torch.int64))
        dropped = (module.loss(batch, generator(0)).noised.group == UNLABELLED).double().mean()
        error = 4 * math.sqrt(label_dropout * (1 - label_dropout) / 4000)
        assert float(dropped) == pytest.approx(label_dropout, abs=error)
        module.eval()
        assert (module.loss(batch, generator(0)).noised.group == 1).all()

    def test_rows_with_a_dropped_label_use_the_references_of_all_classes(self):
        module = conditional_module(
            target=STF("batch"), label_dropout=0.5, timesteps=Uniform(1e5, 2e5)
        )
        batch = Clean(torch.randn(40, 2), torch.arange(40) % 2)
        found = module.loss(batch, generator(0))
        expected = torch.where(found.noised.group == UNLABELLED, 40.0, 20.0)
        torch.testing.assert_close(found.target.ess, expected, rtol=1e-3, atol=0)

    def test_the_network_sees_a_dropped_label_as_the_class_after_the_last(self):
        seen = []

        class Spy(Plain):
            def forward(self, x, t, class_labels):
                seen.append(class_labels)
                return super().forward(x, t)

        module = DiffusionModule(Spy(), num_classes=2)
        xt, t = torch.zeros(3, 2), torch.ones(3)
        module.denoise(xt, t, torch.tensor([0, UNLABELLED, 1]))
        module.denoise(xt, t)
        assert [labels.tolist() for labels in seen] == [[0, 2, 1], [2, 2, 2]]


class TestNetworks:
    @pytest.mark.parametrize("build", [Plain, network, lambda: nn.Sequential(Plain())[0]])
    def test_any_module_of_points_trains(self, build):
        trainer(max_epochs=1).fit(DiffusionModule(build()), loader())

    def test_a_diffusers_unet_trains_with_classes(self):
        images = Clean(torch.randn(16, 1, 8, 8), torch.arange(16) % 10)
        module = DiffusionModule(
            small_unet(num_class_embeds=11), num_classes=10, target=STF("batch")
        )
        loss = module.loss(images, generator(0)).loss
        loss.backward()
        assert all(p.grad is not None for p in module.network.parameters())
        samples = module.sample(2, group=[0, 9], shape=(1, 8, 8), sampler=Sampler(steps=2))
        assert samples.shape == (2, 1, 8, 8)

    def test_a_network_may_return_a_tuple_or_an_object_with_a_sample(self):
        class Pair(Plain):
            def forward(self, x, t):
                return super().forward(x, t), None

        class Wrapped(Plain):
            def forward(self, x, t):
                return diffusers.models.unets.unet_2d.UNet2DOutput(super().forward(x, t))

        losses = []
        for kind in (Plain, Pair, Wrapped):
            torch.manual_seed(0)
            losses.append(DiffusionModule(kind()).loss(points().x0, generator(0)).loss.item())
        assert losses[0] == losses[1] == losses[2]

    def test_a_condition_reaches_the_network_as_keywords(self):
        class Captioned(Plain):
            def forward(self, x, t, text):
                return super().forward(x, t) + text

        class Text(DiffusionModule):
            def encode(self, batch):
                return Clean(batch["x0"], cond={"text": batch["x0"]})

        module = Text(Captioned(), target=STF(8))
        trainer(max_epochs=1).fit(module, loader())
        assert torch.equal(module.estimate.target.x0, module.estimate.noised.x0)
        samples = module.sample(5, cond={"text": torch.ones(5, 2)}, batch_size=2)
        assert samples.shape == (5, 2)

    def test_frozen_parameters_are_left_out_of_the_optimizer(self):
        module = DiffusionModule(network())
        module.network.project_in.requires_grad_(False)
        optimizer = module.configure_optimizers()
        count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        assert count == sum(p.numel() for p in module.parameters() if p.requires_grad)

    def test_learning_rate_schedules_step_with_the_optimizer(self):
        module = DiffusionModule(
            network(),
            optimizer=lambda p: torch.optim.SGD(p, lr=2**-6),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
        )
        fit = trainer(max_epochs=1)
        fit.fit(module, loader())
        assert fit.optimizers[0].param_groups[0]["lr"] == 2**-10


class TestSampling:
    def module(self, **options):
        return conditional_module(**{"label_dropout": 0.1} | options).eval()

    def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_unconditional_one(self):
        module, group = self.module(), torch.tensor([0, 1, 0])

        def sample(guidance, labels):
            sampler = Sampler(steps=6, guidance=guidance)
            return module.sample(
                3, group=labels, shape=(2,), sampler=sampler, source=generator("guided")
            )

        plain = Sampler(steps=6).solve(
            lambda xt, t: module.denoise(xt, t, group).detach(),
            module.schedule,
            torch.randn(3, 2, generator=generator("guided")),
        )
        assert torch.equal(sample(1.0, group), plain)
        torch.testing.assert_close(sample(0.0, group), sample(1.0, None))
        assert not torch.allclose(sample(3.0, group), plain)

    def test_guidance_extrapolates_from_the_unconditional_model(self):
        module, group = self.module(), torch.tensor([0, 1, 0])
        noise = torch.randn(3, 2, generator=generator("guided"))

        def denoiser(xt, t):
            with torch.no_grad():
                conditional, free = module.denoise(xt, t, group), module.denoise(xt, t)
            return free + 2.5 * (conditional - free)

        expected = Sampler(steps=6).solve(denoiser, module.schedule, noise)
        sampler = Sampler(steps=6, guidance=2.5)
        found = module.sample(
            3, group=group, shape=(2,), sampler=sampler, source=generator("guided")
        )
        torch.testing.assert_close(found, expected)

    def test_samples_do_not_depend_on_the_batch_size(self):
        module = self.module(sampler=Sampler(steps=5))
        group = torch.arange(7) % 2
        whole, parts = (
            module.sample(7, group=group, shape=(2,), source=generator(0), batch_size=size)
            for size in (7, 3)
        )
        torch.testing.assert_close(whole, parts)

    def test_samples_of_a_stochastic_solver_follow_from_the_seed_at_any_batch_size(self):
        module = self.module(sampler=Sampler(DDIM(eta=1.0), steps=5))
        group = torch.arange(7) % 2

        def sample(seed, batch_size):
            return module.sample(7, group=group, shape=(2,), seed=seed, batch_size=batch_size)

        torch.testing.assert_close(sample(1, 7), sample(1, 3))
        assert not torch.allclose(sample(1, 7), sample(2, 7))

    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_the_count_of_network_evaluations_is_kept(self, guidance):
        module, calls = self.module(), []
        module.network.register_forward_hook(lambda *_: calls.append(1))
        assert module.sample_evaluations == 0
        for sampler in (Sampler(steps=4, guidance=guidance), Sampler(RK45(1e-2, 1e-2))):
            calls.clear()
            module.sample(3, group=[0, 1, 0], shape=(2,), sampler=sampler)
            assert module.sample_evaluations == len(calls) > 0
            assert sampler.evaluations in (7, None)

    def test_sampling_leaves_modes_streams_and_gradients_alone(self):
        module = self.module()
        module.train()
        module.network.blocks.eval()
        modes = [part.training for part in module.modules()]
        state = torch.get_rng_state()
        samples = module.sample(4, shape=(2,))
        assert [part.training for part in module.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert not samples.requires_grad
        assert all(p.grad is None for p in module.parameters())

    def test_sampling_evaluates_without_dropout(self):
        net = Plain()
        net.linear = nn.Sequential(net.linear, nn.Dropout(0.5))
        module = DiffusionModule(net)
        first, second = (module.sample(4, shape=(2,), source=generator(0)) for _ in range(2))
        assert torch.equal(first, second)

    def test_after_training_samples_have_the_shape_of_the_data(self):
        module = conditional_module(label_dropout=0.1)
        trainer(max_epochs=1).fit(module, loader())
        assert module.sample(3).shape == (3, 2)

    def test_evaluating_gives_every_part_its_mode_back_even_after_an_error(self):
        net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
        net[1].eval()
        modes, seen = [part.training for part in net.modules()], []

        def look_and_fail():
            seen.extend(part.training for part in net.modules())
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), evaluating(net):
            look_and_fail()
        assert seen == [False] * 5
        assert [part.training for part in net.modules()] == modes

    def test_prediction_draws_and_decodes_one_sample_for_each_request(self):
        class Decoded(DiffusionModule):
            def decode(self, x0):
                return x0 + 100

        module = Decoded(network(3), num_classes=2, sampler=Sampler(steps=3))
        module.sample_shape = (2,)
        requests = DataLoader([{"index": i, "label": i % 2} for i in range(5)], batch_size=2)
        parts = trainer().predict(module, requests)
        assert [len(part) for part in parts] == [2, 2, 1]
        assert float(torch.cat(parts).mean()) > 50
        assert not torch.equal(parts[0], parts[1])


class TestBatches:
    @pytest.mark.parametrize("key", ["x0", "image"])
    def test_tensors_tuples_and_dictionaries_are_understood(self, key):
        module, x = DiffusionModule(network()), torch.zeros(3, 2)
        label, index = torch.arange(3), torch.arange(3)
        assert module.encode(x).x0 is x
        assert module.encode((x,)).x0 is x
        assert module.encode([x, label]).group is label
        clean = module.encode({key: x, "label": label, "index": index})
        assert clean.x0 is x
        assert clean.group is label
        assert clean.index is index

    @pytest.mark.parametrize("batch", ["text", {"pixels": torch.zeros(2, 2)}, ["a", "b"], []])
    def test_another_batch_is_refused_with_what_to_override(self, batch):
        with pytest.raises(ValueError, match="override `encode`"):
            DiffusionModule(network()).encode(batch)

    def test_a_plain_tensor_data_set_trains(self):
        trainer(max_epochs=1).fit(
            DiffusionModule(network(), target=STF(8)), loader(TensorDataset(torch.randn(32, 2)))
        )

    def test_a_stream_trains_where_no_bank_is_needed(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(torch.randn(32, 2))

        for target in (DSM(), STF("batch")):
            trainer(max_epochs=1).fit(DiffusionModule(network(), target=target), loader(Stream()))
        with pytest.raises(ValueError, match=r"one DataLoader of a map-style data set.*'batch'"):
            trainer(max_epochs=1).fit(DiffusionModule(network(), target=STF(8)), loader(Stream()))

    def test_the_bank_is_the_encoded_training_set_in_its_own_order(self):
        class Scaled(DiffusionModule):
            def encode(self, batch):
                return replace(super().encode(batch), x0=2 * batch["x0"])

        module, data = Scaled(network(3), num_classes=2, target=STF("all")), points()
        trainer(max_epochs=1).fit(module, loader(data, batch_size=5, shuffle=True))
        bank = module.target.bank
        torch.testing.assert_close(bank.rows + bank.centre, 2 * data.x0)
        assert torch.equal(bank.group, data.label)

    def test_training_on_all_references_regresses_on_the_exact_posterior_mean(self):
        module, data = conditional_module(target=STF("all"), schedule=VP()), points()
        trainer(max_epochs=1).fit(module, loader(data, shuffle=True))
        noised, target = module.estimate.noised, module.estimate.target
        distances = (noised.xt[:, None] - noised.alpha[:, None, None] * data.x0).square().sum(2)
        logits = -distances / (2 * noised.sigma[:, None] ** 2)
        logits = logits.masked_fill(noised.group[:, None] != data.label, -math.inf)
        torch.testing.assert_close(target.x0, logits.softmax(1) @ data.x0, rtol=1e-4, atol=1e-4)


def nan_at(row):
    x0 = points().x0.clone()
    x0[row, 1] = math.nan
    return points(x0=x0)


def large_label():
    label = points().label.clone()
    label[-1] = 2
    return points(label=label)


class Unindexed(Points):
    def __getitem__(self, i):
        return {"x0": self.x0[i], "label": self.label[i]}


class TestBadInput:
    def fit(self, data, validation=False, **options):
        record = Record()
        module = conditional_module(**options)
        try:
            trainer(record, max_epochs=1).fit(
                module, loader(data), loader(data) if validation else None
            )
        finally:
            assert record.losses == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prediction": "eps"}, "`prediction` must be 'x0', .* got 'eps'"),
            ({"sigma_data": 0.0}, "`sigma_data` must be positive"),
            ({"num_classes": 0}, "`num_classes` must be at least 1, got 0"),
            ({"label_dropout": 0.1}, "`label_dropout` must be 0 without classes, got 0.1"),
            (
                {"num_classes": 2, "label_dropout": 1.5},
                "`label_dropout` must be between 0 and 1, got 1.5",
            ),
        ],
    )
    def test_arguments_that_mean_nothing_are_refused_at_once(self, options, message):
        with pytest.raises(ValueError, match=message):
            DiffusionModule(network(), **options)

    def test_a_fourier_time_embedding_is_refused_at_once(self):
        with pytest.raises(ValueError, match=r"time_embedding_type='fourier'.*use 'positional'"):
            DiffusionModule(small_unet(time_embedding_type="fourier"))

    @pytest.mark.parametrize("target", [DSM(), STF("batch"), STF(8)], ids=["DSM", "batch", "bank"])
    def test_samples_that_are_not_finite_are_refused(self, target):
        with pytest.raises(ValueError, match="must be finite, but sample 3 is not"):
            self.fit(nan_at(3), target=target)

    def test_a_bank_finds_the_sample_that_is_not_finite_wherever_it_stands(self):
        with pytest.raises(ValueError, match="must be finite, but sample 29 is not"):
            self.fit(nan_at(29), target=STF("all"))

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.uint8])
    def test_samples_that_are_not_real_numbers_are_refused(self, dtype):
        with pytest.raises(ValueError, match=f"`x0` must be a real .* got {dtype}"):
            self.fit(points(x0=torch.ones(32, 2).to(dtype)))

    @pytest.mark.parametrize("validation", [False, True])
    @pytest.mark.parametrize("target", [DSM(), STF(8)], ids=["DSM", "bank"])
    def test_a_label_outside_its_range_is_refused(self, target, validation):
        data = points(label=torch.full((32,), 5)) if target.bank_size == 0 else large_label()
        worst = 5 if target.bank_size == 0 else 2
        with pytest.raises(ValueError, match=rf"in \[0, 2\), as `num_classes` .* which is {worst}"):
            self.fit(data, validation, target=target)

    def test_labels_that_are_no_classes_are_refused(self):
        with pytest.raises(ValueError, match="`group` must be integers"):
            self.fit(points(label=torch.rand(32)))

    @pytest.mark.parametrize("references", [33, 4096])
    def test_more_references_than_samples_are_refused(self, references):
        with pytest.raises(ValueError, match=f"at most 32, .* got {references}"):
            self.fit(points(), target=STF(references))

    def test_an_index_that_is_not_the_position_is_refused(self):
        with pytest.raises(ValueError, match="sample 0 has index 7: let item i of the data set"):
            self.fit(points(offset=7), target=STF(8))

    def test_all_references_without_indices_are_refused(self):
        with pytest.raises(ValueError, match=r"`references='all'` needs sample indices"):
            self.fit(Unindexed(normal_points(32, "points"), two_classes(32)), target=STF("all"))

    @pytest.mark.parametrize("validation", [False, True])
    def test_a_network_with_another_output_shape_is_refused(self, validation):
        class Wide(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(2, 3)

            def forward(self, x, t):
                return self.linear(x)

        with pytest.raises(
            ValueError, match=r"`network` .* \(8, 2\), or .* got \(8, 3\) from Wide"
        ):
            trainer().fit(DiffusionModule(Wide()), loader(), loader() if validation else None)


def test_edm_defaults_are_those_of_the_paper():
    module = DiffusionModule(network())
    assert isinstance(module.schedule, EDM)
    assert module.prediction == "edm"
    assert (module.timesteps.mean, module.timesteps.std) == (-1.2, 1.2)
    x0 = Clean(torch.randn(64, 2))
    t = torch.logspace(-2, 1, 64)
    noised = noise_samples(x0, module.schedule, t, torch.ones_like(t), generator(0))
    x0_hat = module.denoise(noised.xt, t)
    published = (t**2 + 0.25) / (0.5 * t) ** 2 * (x0_hat - x0.x0).square().mean(1)
    found = diffusion_loss(
        module.predict,
        noised,
        DSM()(noised, x0, generator(0)),
        objective=module.objective,
    )
    torch.testing.assert_close(found.per_draw, published, rtol=1e-3, atol=1e-5)


def test_a_class_embedding_without_room_for_the_dropped_label_is_refused():
    with pytest.raises(
        ValueError,
        match=r"10 classes and the dropped label, .*num_class_embeds=10: .* 11",
    ):
        DiffusionModule(ResidualMLP(num_class_embeds=10), num_classes=10)


def test_noise_levels_of_the_sampler_are_checked_when_the_module_is_built():
    with pytest.raises(ValueError, match="0 < min < max, got 90 and 80"):
        DiffusionModule(ResidualMLP(), sampler=Sampler(noise_level_min=90.0))


def test_a_module_copies_whatever_its_optimizer_holds_on_to():
    class Holds:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, parameters):
            return torch.optim.SGD(parameters, lr=0.5)

    module = DiffusionModule(ResidualMLP(), optimizer=Holds())
    copied = copy.deepcopy(module)
    assert copied.optimizer is module.optimizer
    assert copied.configure_optimizers().defaults["lr"] == 0.5
    assert copied.network is not module.network
