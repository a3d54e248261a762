"""Diffusion of latents that are encoded on the fly, or read from a cache."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from support.latents import Pictures, save_autoencoder, write_cache
from support.networks import small_mlp, small_unet
from support.stops import StopAt, StoppedError
from support.trainers import quiet_trainer

from lightning_vr import CARV, STF, AutoencoderFolder, DiffusionModule, LatentDiffusionModule
from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean, Noised
from lightning_vr.data import CachedLatents
from lightning_vr.training.latent_cache import cache_latents

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an autoencoder and a cache of pictures that it has encoded."""
    folder = tmp_path_factory.mktemp("latents")
    save_autoencoder(folder / "vae")
    torch.manual_seed(0)
    module, trainer = latent_module(folder), quiet_trainer()
    cache_latents(module, Pictures(), folder / "cache", shard_size=4, batch_size=3, trainer=trainer)
    return folder


def latent_module(folder, kind=LatentDiffusionModule, posterior="sample", **settings):
    defaults = {"optimizer": partial(torch.optim.SGD, lr=0.1)}
    return kind(
        small_unet(in_channels=2, out_channels=2, sample_size=4),
        AutoencoderFolder(str(folder / "vae"), posterior=posterior),
        **(defaults | settings),
    )


def fit(module, data, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(7)
    options = {"max_epochs": 2, "limit_val_batches": 0} | options
    quiet_trainer(*callbacks, **options).fit(module, data, ckpt_path=ckpt_path)
    return torch.nn.utils.parameters_to_vector(module.parameters())


def test_pictures_are_encoded_as_draws_or_means_and_decoded(files):
    batch = next(iter_batches(Pictures()))
    module = latent_module(files)
    mean, std = module.autoencoder.moments(batch["image"])
    torch.manual_seed(0)
    clean = module.encode(batch)
    torch.manual_seed(0)
    assert torch.equal(clean.x0, mean + std * torch.randn_like(std))
    assert torch.equal(clean.group, batch["label"])
    assert torch.equal(latent_module(files, posterior="mean").encode(batch).x0, mean)
    pictures = module.decode(clean.x0)
    assert pictures.shape == batch["image"].shape
    assert module.encode(clean) is clean


def iter_batches(data):
    data.setup()
    return iter(data.train_dataloader())


def test_a_cache_holds_what_the_autoencoder_gives(files):
    data, cached = Pictures(), CachedLatents(str(files / "cache"), posterior="mean", batch_size=4)
    data.setup()
    cached.setup()
    module = latent_module(files)
    for name in ("train_dataset", "validation_dataset"):
        pictures, latents = getattr(data, name), getattr(cached, name)
        assert len(pictures) == len(latents)
        mean, std = module.autoencoder.moments(pictures.x)
        rows = [latents[i] for i in range(len(latents))]
        torch.testing.assert_close(torch.stack([row["x0"] for row in rows]), mean)
        assert [int(row["label"]) for row in rows] == pictures.label.tolist()
        assert [int(row["index"]) for row in rows] == list(range(len(rows)))
    mean, std = module.autoencoder.moments(data.train_dataset.x)
    variance = mean.var(correction=0) + std.square().mean()
    drawn = CachedLatents(str(files / "cache"), batch_size=4)
    drawn.setup()
    assert drawn.sigma_data == pytest.approx(float(variance.sqrt()), rel=1e-5)


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_training_from_a_cache_resumes_bitwise_in_the_middle_of_an_epoch(
    files, tmp_path, posterior, caplog
):
    def module():
        return latent_module(files, sigma_data="auto", target=STF("all"))

    def data():
        return CachedLatents(str(files / "cache"), batch_size=2, posterior=posterior)

    whole = fit(module(), data())
    for batches in (3, 7):  # in the first epoch of five batches, and in the second
        path = tmp_path / f"{batches}.ckpt"
        with pytest.raises(StoppedError):
            fit(module(), data(), StopAt("on_train_batch_end", batches, path))
        assert torch.equal(fit(module(), data(), ckpt_path=path), whole)
    assert "differ from the bank's copies" not in caplog.text


def test_a_checkpoint_holds_the_digest_in_place_of_the_autoencoder(files, tmp_path):
    module = latent_module(files, sigma_data="auto")
    data = CachedLatents(str(files / "cache"), batch_size=4)
    path = tmp_path / "last.ckpt"
    with pytest.raises(StoppedError):
        fit(module, data, StopAt("on_train_batch_end", 2, path))
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"].keys() == {f"network.{name}" for name in module.network.state_dict()}
    with pytest.raises(ValueError, match=r"`autoencoder` of the module in .* must be given again"):
        DiffusionModule.load_from_checkpoint(path)
    own = AutoencoderFolder(str(files / "vae"))
    again = DiffusionModule.load_from_checkpoint(path, autoencoder=own)
    assert isinstance(again, LatentDiffusionModule)
    assert again.sigma_data == data.sigma_data
    x0 = again.sample(2, seed=0)
    assert torch.equal(x0, module.sample(2, seed=0))
    assert torch.equal(again.decode(x0), module.decode(x0))

    save_autoencoder(tmp_path / "moved")
    moved = AutoencoderFolder(str(tmp_path / "moved"))
    LatentDiffusionModule.load_from_checkpoint(path, autoencoder=moved)
    save_autoencoder(tmp_path / "other", seed=1)
    other = AutoencoderFolder(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="must be the one that the checkpoint was trained with"):
        LatentDiffusionModule.load_from_checkpoint(path, autoencoder=other)


def test_a_cache_of_another_autoencoder_is_refused_before_training(files, tmp_path):
    save_autoencoder(tmp_path / "vae", seed=1)
    data = CachedLatents(str(files / "cache"), batch_size=4)
    with pytest.raises(
        ValueError, match="must be a cache of the module's autoencoder, but"
    ) as error:
        fit(latent_module(tmp_path), data)
    assert "\n" not in str(error.value)


def test_auto_sigma_data_needs_a_cache(files):
    with pytest.raises(ValueError, match="must be a number where pictures are encoded on the fly"):
        fit(latent_module(files, sigma_data="auto"), Pictures())
    with pytest.raises(ValueError, match="must be a number or 'auto', got 'Auto'"):
        latent_module(files, sigma_data="Auto")


def test_the_resamples_that_pay_from_a_cache_are_one(files):
    module = latent_module(files, draws=CARV("auto"))
    fit(module, CachedLatents(str(files / "cache"), batch_size=4), max_epochs=1)
    assert module.draws.draws_per_sample == 1
    assert module.draws.pilot is not None


class Captioned(LatentDiffusionModule):
    """Encodes a column of text by one embedding."""

    def __init__(self, network, autoencoder, **settings):
        super().__init__(network, autoencoder, **settings)
        self.text = torch.nn.Embedding(4, 3).requires_grad_(False)
        with torch.no_grad():
            self.text.weight.copy_(torch.arange(12.0).reshape(4, 3))

    def encode_condition(self, rows):
        text = self.text(rows["word"])
        return {"words": {"text": text}, "style": text[:1] * 0 + 5}

    def predict(self, x, noised):
        return super().predict(x, replace(noised, cond=None)) + noised.cond["words"]["text"].mean()


class WithWords(Pictures):
    """Pictures with a column of text."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.collate_fn = self.collate
        return loader

    def val_dataloader(self):
        loader = super().val_dataloader()
        loader.collate_fn = self.collate
        return loader

    def collate(self, samples):
        batch = torch.utils.data.default_collate(samples)
        return batch | {"word": batch["index"] % 4}


def test_conditions_are_cached_as_they_are_encoded_on_the_fly(files, tmp_path):
    module = latent_module(files, Captioned)
    cache_latents(module, WithWords(), tmp_path / "cache", trainer=quiet_trainer())
    data = CachedLatents(str(tmp_path / "cache"), batch_size=4)
    fit(module, data, max_epochs=1)
    for batch in data.train_dataloader():
        text = module.encode(batch).cond["words"]["text"]
        assert torch.equal(text, module.text(batch["index"] % 4))
        assert torch.equal(batch["cond"]["style"], torch.full_like(text, 5))
    for batch in iter_batches(WithWords()):
        text = module.encode(batch).cond["words"]["text"]
        assert torch.equal(text, module.text(batch["word"]))

    other = latent_module(files, Captioned)
    torch.nn.init.zeros_(other.text.weight)
    with pytest.raises(ValueError, match="must be a cache of the module's conditions"):
        fit(other, data, max_epochs=1)


POINTS = torch.tensor([-2.0, -1.0, 0.5, 2.5]).reshape(4, 1)
SPREAD = torch.tensor([0.5, 1.0, 0.25, 1.5]).reshape(4, 1)


def mixture_mean(xt, sigma):
    """E[x0 | xt] where x0 is of a mixture of normal distributions, in closed form."""
    total = SPREAD.double().square().T + sigma**2
    centre = POINTS.double().T
    logits = -0.5 * (xt - centre).square() / total - 0.5 * total.log()
    own = centre + (total - sigma**2) / total * (xt - centre)
    return (logits.softmax(dim=1) * own).sum(dim=1, keepdim=True)


def z_scores(folder, bank_of_first_epoch):
    """z of the mean of (target - E[x0 | xt]) and of its product with xt, over many epochs."""
    sigma, epochs, copies = 4.0, 200, 8
    data = CachedLatents(str(folder), batch_size=4)
    data.setup()
    dataset, found = data.train_dataset, []
    target = STF("all")
    noise = torch.randn(epochs, 4 * copies, 1, generator=generator("noise"))
    for epoch in range(epochs):
        dataset.start_epoch(1, epoch)
        x0 = torch.stack([dataset[i]["x0"] for i in range(4)])
        if epoch == 0 or not bank_of_first_epoch:
            target.fill(x0, None, indexed=True)
        own = Clean(x0, index=torch.arange(4)).repeated(copies)
        xt = own.x0 + sigma * noise[epoch]
        one = torch.ones(len(xt))
        noised = noised_at(own, xt, noise[epoch], sigma * one, one)
        estimate = target(noised, own, generator("unused")).x0.double()
        error = estimate - mixture_mean(xt.double(), sigma)
        found.append(torch.cat([error, error * xt], dim=1).mean(dim=0))
    values = torch.stack(found)  # epochs are independent
    return values.mean(dim=0) / values.std(dim=0) * math.sqrt(epochs)


def noised_at(clean, xt, noise, sigma, one):
    return Noised(xt, clean.x0, noise, sigma, one, sigma, one, index=clean.index)


def test_stf_is_unbiased_with_the_draws_of_each_epoch_and_not_with_those_of_the_first(tmp_path):
    write_cache(tmp_path, POINTS, SPREAD)
    assert float(z_scores(tmp_path, bank_of_first_epoch=False).abs().max()) < 4
    assert float(z_scores(tmp_path, bank_of_first_epoch=True).abs().max()) > 8


def test_the_bank_is_that_of_the_epoch(tmp_path, caplog):
    write_cache(tmp_path, torch.randn(8, 2), torch.ones(8, 2))
    seen = []

    class See(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            bank, noised = module.target.bank, module.estimate.noised
            rows = (bank.rows + bank.centre)[noised.index]
            torch.testing.assert_close(rows, noised.x0)
            seen.append(noised.x0[noised.index.argsort()])

    module = DiffusionModule(small_mlp(), target=STF("all"))
    fit(module, CachedLatents(str(tmp_path), batch_size=8), See())
    assert len(seen) == 2
    assert not torch.equal(*seen)
    assert "differ from the bank's copies" not in caplog.text
