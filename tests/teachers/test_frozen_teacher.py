"""A frozen teacher: its residual, its guidance, and where it is and is not."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler
from support.networks import small_mlp, small_unet
from support.points import Points, normal_points, two_classes
from support.trainers import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_vr import VE, VP, Clean, DiffusersSchedule, DiffusionModule, Noised, RectifiedFlow
from lightning_vr.core.rng import generator
from lightning_vr.estimators.draws import IID
from lightning_vr.teachers import FrozenTeacher
from lightning_vr.training.diffusion import Diffusion

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


class Text(nn.Module):
    """A network that is told of a text and of a class."""

    def __init__(self):
        super().__init__()
        self.inner = small_mlp(std=1.0, num_class_embeds=4)
        self.sizes = []

    def forward(self, x, t, class_labels=None, text=None):
        self.sizes.append(len(x))
        found = self.inner(x, t, class_labels)
        return found if text is None else found * (1 + text)


def draws_of(teacher, count=6, group=None, cond=None):
    x0 = normal_points(count, "teacher").double()
    return IID()(Clean(x0, group, cond), teacher.model.objective, generator("draws"))


@pytest.mark.parametrize("kind", ["x0", "epsilon", "v", "score", "velocity", "edm"])
@pytest.mark.parametrize("schedule", [VP(), VE(), RectifiedFlow()])
def test_the_noise_residual_is_the_noise_of_x0_hat_less_the_noise(schedule, kind):
    teacher = FrozenTeacher(small_mlp(std=1.0).double(), schedule, kind)
    noised = draws_of(teacher)
    alpha, sigma = noised.alpha[:, None], noised.sigma[:, None]
    noise_hat = (noised.xt - alpha * teacher.denoise(noised)) / sigma
    torch.testing.assert_close(
        teacher.noise_residual(noised), noise_hat - noised.noise, rtol=1e-6, atol=1e-6
    )


def test_at_low_noise_the_residual_of_an_exact_network_is_zero_and_not_rounding():
    class Exact(nn.Module):
        def forward(self, x, t):
            return self.noise

    network = Exact()
    teacher = FrozenTeacher(network, VP())
    x0, noise = normal_points(6, "exact"), normal_points(6, "noise")
    t = torch.full((6,), 1e-4)
    alpha, sigma = VP().alpha(t), VP().sigma(t)
    xt = alpha[:, None] * x0 + sigma[:, None] * noise
    network.noise = noise
    found = teacher.noise_residual(Noised(xt, x0, noise, t, alpha, sigma, torch.ones(6)))
    assert torch.equal(found, torch.zeros(6, 2))
    naive = (xt - alpha[:, None] * x0) / sigma[:, None] - noise
    assert float(naive.abs().max()) > 1e-6


def test_guidance_is_two_passes_in_one_call_and_extrapolates_from_the_negative_condition():
    network = Text()
    teacher = FrozenTeacher(network, VP(), num_classes=3, guidance=7.0)
    group = torch.tensor([0, 1, 2, 0, 1, 2])
    text, negative = normal_points(6, "text", 2), normal_points(6, "negative", 2)
    noised = draws_of(teacher, group=group, cond={"text": text, "negative_text": negative})
    network.sizes.clear()
    guided = teacher.noise_residual(noised)
    assert network.sizes == [12]

    labelled = draws_of(teacher, group=group, cond={"text": text})
    unlabelled = draws_of(teacher, cond={"text": negative})
    conditional = teacher.noise_residual(labelled, guidance=1.0)
    null = teacher.noise_residual(unlabelled, guidance=1.0)
    torch.testing.assert_close(guided, null + 7.0 * (conditional - null), rtol=1e-4, atol=1e-4)


def test_a_null_condition_of_the_teacher_stands_in_for_a_negative_one():
    teacher = FrozenTeacher(Text(), VP(), guidance=3.0, null_cond="zeros")
    text = normal_points(6, "text", 2)
    found = teacher.denoise(draws_of(teacher, cond={"text": text}))
    both = {"text": text, "negative_text": torch.zeros(6, 2)}
    torch.testing.assert_close(found, teacher.denoise(draws_of(teacher, cond=both)))


@pytest.mark.parametrize(
    ("arguments", "cond", "reason"),
    [
        ({"guidance": 5.0}, None, "without labels and without a condition, got 5"),
        ({"guidance": 5.0}, {"text": torch.zeros(6, 2)}, "must hold 'negative_text' beside 'text'"),
        (
            {},
            {
                "text": torch.zeros(6, 2),
                "other": torch.zeros(6, 2),
                "negative_text": torch.ones(6, 2),
            },
            "a negative part for all of its names or for none",
        ),
    ],
)
def test_guidance_with_nothing_to_lead_away_from_is_refused_in_one_line(arguments, cond, reason):
    teacher = FrozenTeacher(Text(), VP(), **arguments)
    with pytest.raises(ValueError, match=reason) as refused:
        teacher.noise_residual(draws_of(teacher, cond=cond))
    assert "\n" not in str(refused.value)


def test_guidance_of_a_module_that_never_dropped_labels_is_refused():
    module = Diffusion(small_mlp(num_class_embeds=3), num_classes=2)
    with pytest.raises(ValueError, match="labels are never dropped in training"):
        FrozenTeacher.from_module(module, guidance=2.0)


class Owner(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.scene = teacher, nn.Linear(2, 2)


def test_a_teacher_is_frozen_and_no_part_of_what_its_owner_saves_trains_or_copies():
    network = Text()
    network.train()
    owner = Owner(FrozenTeacher(network, VP()))
    owner.train()
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert set(owner.state_dict()) == {"scene.weight", "scene.bias"}
    assert len(list(owner.parameters())) == 2
    again = copy.deepcopy(owner)
    assert again.teacher.model.network is network
    owner.load_state_dict(again.state_dict())
    noised = draws_of(owner.teacher)
    assert not owner.teacher.noise_residual(noised).requires_grad


def test_a_teacher_follows_the_device_of_its_owner_and_keeps_its_dtype():
    owner = Owner(FrozenTeacher(small_mlp(), VP(), dtype="bfloat16"))
    owner.half()
    assert {p.dtype for p in owner.teacher.model.parameters()} == {torch.bfloat16}
    assert owner.teacher.noise_residual(draws_of(owner.teacher)).dtype == torch.float64
    owner.to("meta")
    assert {p.device.type for p in owner.teacher.model.parameters()} == {"meta"}


def test_a_module_that_goes_on_training_leaves_its_teacher_as_it_was():
    module = DiffusionModule(small_mlp(std=1.0), schedule=VP())
    teacher = FrozenTeacher.from_module(module)
    noised = draws_of(teacher)
    before = teacher.denoise(noised)
    assert all(p.requires_grad for p in module.parameters())
    with torch.no_grad():
        module.network.project_out.weight.add_(1.0)
    assert torch.equal(teacher.denoise(noised), before)


class Scaled(Diffusion):
    def predict(self, x, noised):
        return (noised.weight * noised.alpha / noised.sigma)[:, None] * super().predict(x, noised)


guidances = pytest.mark.parametrize("guidance", [1.0, 3.0])


@guidances
def test_what_a_module_overrides_counts_in_its_teacher(guidance):
    network = small_mlp(std=1.0, num_class_embeds=3)
    settings = {"prediction": "x0", "num_classes": 2, "label_dropout": 0.1}
    plain, scaled = (
        FrozenTeacher.from_module(kind(network, VP(), **settings), guidance=guidance)
        for kind in (Diffusion, Scaled)
    )
    noised = draws_of(plain, group=two_classes(6))
    factor = noised.weight * noised.alpha / noised.sigma
    expected = factor[:, None] * plain.denoise(noised)
    torch.testing.assert_close(scaled.denoise(noised), expected, rtol=1e-6, atol=1e-6)


@guidances
def test_a_teacher_keeps_its_precision_under_autocast(guidance):
    network = small_mlp(std=1.0, num_class_embeds=3)
    teacher = FrozenTeacher(network, VP(), num_classes=2, guidance=guidance)
    noised = draws_of(teacher, group=two_classes(6))
    expected = teacher.noise_residual(noised)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.noise_residual(noised), expected)
        assert torch.is_autocast_enabled("cpu")


def test_a_teacher_comes_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    network = small_mlp(std=1.0, num_class_embeds=3)
    module = DiffusionModule(network, schedule=VP(), num_classes=2, label_dropout=0.2)
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(module, DataLoader(Points(normal_points(8, 0), two_classes(8)), batch_size=4))
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    teacher = FrozenTeacher.from_checkpoint(tmp_path / "teacher.ckpt", guidance=2.0)
    expected = FrozenTeacher.from_module(module, guidance=2.0)
    noised = draws_of(teacher, group=two_classes(6))
    assert torch.equal(teacher.noise_residual(noised), expected.noise_residual(noised))


def test_a_folder_of_diffusers_is_a_teacher_with_its_autoencoder(tmp_path):
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    DDPMPipeline(small_unet(), scheduler).save_pretrained(tmp_path)
    vae = AutoencoderKL(1, 1, block_out_channels=[4], norm_num_groups=4, latent_channels=1)
    vae.save_pretrained(tmp_path / "vae")
    teacher = FrozenTeacher.from_pretrained(tmp_path)
    assert teacher.model.prediction == "v"
    assert isinstance(teacher.model.schedule, DiffusersSchedule)
    assert torch.equal(teacher.model.network.conv_in.weight, small_unet().conv_in.weight)
    half = FrozenTeacher.from_pretrained(tmp_path, dtype="float16")
    assert half.model.network.dtype == torch.float16

    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    latents = teacher.encode(images)
    (found,) = torch.autograd.grad(latents.square().sum(), images)
    posterior = vae.encode(images).latent_dist
    scaled = vae.config.scaling_factor * posterior.mean
    (expected,) = torch.autograd.grad(scaled.square().sum(), images)
    torch.testing.assert_close(found, expected)
    drawn = teacher.encode(images, generator("latents"))
    noise = torch.randn(latents.shape, generator=generator("latents"))
    torch.testing.assert_close(drawn, scaled + vae.config.scaling_factor * posterior.std * noise)


def test_a_folder_without_a_network_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="either a `unet` or a `transformer`") as refused:
        FrozenTeacher.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)
