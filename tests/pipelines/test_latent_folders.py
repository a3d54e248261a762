"""Latents of text and of classes: parts of diffusers' pipelines come in, train and go out again."""

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    PNDMScheduler,
    UNet2DConditionModel,
)
from round_trips import latent_dit
from support.diffusers_networks import tiny
from support.latents import save_autoencoder
from support.networks import small_unet
from text_models import STEPS, WORDS, OfText, fitted, of_text, pictures_of

from lightning_vr import (
    DiffusionModule,
    Euler,
    LearnedVariance,
    Sampler,
    export,
)
from lightning_vr.cli import main
from lightning_vr.training.incoming_folder import IncomingFolder


def test_a_model_of_text_goes_out_with_its_autoencoder_and_draws_the_same_pictures(text):
    module, folder = text
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        2,
        cond=module.encode_condition({"prompt": WORDS}),  # for no text stand zeros
        guidance_scale=3.0,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    torch.testing.assert_close(
        images, pictures_of(module, pipeline.scheduler, 1), rtol=0, atol=1e-4
    )


def test_guidance_without_what_stands_for_no_text_is_refused(tmp_path):
    null = {"encoder_hidden_states": 0.5}
    pipeline = of_text(tmp_path, null_cond=null, sampler=Sampler(guidance=2.0)).to_pipeline()
    with pytest.raises(ValueError, match="`null_cond` must be given with a `guidance_scale`"):
        pipeline(2, cond={"encoder_hidden_states": torch.zeros(2, 3, 6)})


def test_its_parts_are_those_that_stable_diffusion_is_made_of(text):
    module, folder = text
    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    assert all(
        torch.equal(x, module.network.state_dict()[name])
        for name, x in network.state_dict().items()
    )
    assert network.config.sample_size == 4
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    x0 = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        decoded = vae.decode(x0 / vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(decoded, module.decode(x0))
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.num_train_timesteps == 100
    assert (
        "`unet`, `scheduler` and `vae` are the other parts of a StableDiffusionPipeline"
        in (folder / "README.md").read_text()
    )


def test_parts_of_stable_diffusion_come_in_train_and_go_out_again(tmp_path, capsys):
    stock = {
        "unet": tiny("conditional UNet"),
        "scheduler": PNDMScheduler(skip_prk_steps=True, steps_offset=1, prediction_type="epsilon"),
    }
    save_autoencoder(tmp_path / "stock/vae")
    for name, part in stock.items():
        part.save_pretrained(tmp_path / "stock" / name)
    module = fitted(OfText.from_pretrained(tmp_path / "stock", cond_dropout=0.1, null_cond="zeros"))
    export(module, tmp_path / "out")
    assert PNDMScheduler.from_pretrained(tmp_path / "out/scheduler").config.steps_offset == 1
    network = UNet2DConditionModel.from_pretrained(tmp_path / "out/unet")
    same = [torch.equal(x, stock["unet"].state_dict()[n]) for n, x in network.state_dict().items()]
    assert not all(same)
    again = OfText.from_pretrained(tmp_path / "out")
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(again.decode(x), module.decode(x))
    # on the command line too, where the module is built before data is asked for
    with pytest.raises(SystemExit):
        main(["fit", "--pretrained", str(tmp_path / "stock"), "--model", f"{__name__}.OfText"])
    assert "`data` must be configured" in capsys.readouterr().err


def test_a_stock_dit_comes_in_on_the_command_line_trains_and_goes_out_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = latent_dit(tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    DiTPipeline(source.network, vae, DDIMScheduler(clip_sample=False)).save_pretrained("stock")
    optimizer = {"class_path": "SGD", "init_args": {"lr": 1e-3}}
    settings = {
        "pretrained": "stock",
        "model": {"init_args": {"optimizer": optimizer}},
        "data": {"class_path": "Digits"},
        "trainer": {
            "max_steps": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "callbacks": {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", "run.yaml"])
    config = yaml.safe_load((tmp_path / "runs/version_0/config.yaml").read_text())["model"]
    assert config["class_path"].endswith("LatentDiffusionModule")
    arguments = config["init_args"]
    assert (arguments["num_classes"], arguments["label_dropout"]) == (1000, 0.1)
    run = ["--config", "runs/version_0/config.yaml", "--ckpt_path", "last"]
    main(["export", *run, "--output", "out"])

    pipeline = DiTPipeline.from_pretrained("out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.get_label_ids(["3"]) == [3]
    before, after = source.network.state_dict(), pipeline.transformer.state_dict()
    assert any(not torch.equal(x, before[name]) for name, x in after.items())
    images = pipeline([3, 5], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()


def test_a_scheduler_that_stable_diffusion_would_change_is_not_said_to_be_its_part(tmp_path):
    scheduler = DDPMScheduler(100, clip_sample=True, steps_offset=1)
    module = of_text(tmp_path, schedule=scheduler, prediction="epsilon")
    module.sample_shape = (2, 4, 4)
    export(module, tmp_path / "out")
    assert "StableDiffusionPipeline" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"label_dropout": 0.0},  # guidance is on where nothing is said
        {"sampler": Sampler(guidance=0.5)},  # which it would not follow
        {"schedule": DDPMScheduler(100, variance_type="learned_range")},
    ],
)
def test_what_a_dit_pipeline_would_sample_wrongly_goes_out_as_our_own(tmp_path, options):
    pipeline = latent_dit(tmp_path / "vae", **options).to_pipeline()
    assert type(pipeline).__name__ == "DenoisingPipeline"
    assert pipeline.vae is not None


@pytest.mark.parametrize("shifted", [{"shift_factor": 0.3}, {"latents_std": [1.0, 2.0]}])
def test_a_shift_of_latents_goes_out_with_our_own_pipeline(tmp_path, shifted):
    save_autoencoder(tmp_path / "vae", **shifted)
    module = latent_dit(tmp_path / "vae")
    pipeline = module.to_pipeline()
    assert type(pipeline).__name__ == "DenoisingPipeline"
    x = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        found = pipeline._finish(x, "pt")
    torch.testing.assert_close(found, module.decode(x) / 2 + 0.5)


def test_a_learned_variance_goes_out_with_the_scheduler_where_no_solver_is_chosen(tmp_path):
    schedule = DDPMScheduler(50, clip_sample_range=0.7)
    options = {"schedule": schedule, "prediction": "epsilon", "variance": LearnedVariance()}
    pipeline = DiffusionModule(small_unet(out_channels=2), **options).to_pipeline()
    assert type(pipeline) is DDPMPipeline
    found, own = (
        {name: value for name, value in each.config.items() if name[0] != "_"}
        for each in (pipeline.scheduler, schedule)
    )
    assert found == own | {"variance_type": "learned_range"}
    options["sampler"] = Sampler(Euler())
    pipeline = DiffusionModule(small_unet(out_channels=2), **options).to_pipeline()
    assert type(pipeline).__name__ == "DenoisingPipeline"  # which leaves the variance out
    assert pipeline.scheduler.config.variance_type == "fixed_small"


def test_a_variance_that_a_folder_has_learned_is_learned_further(tmp_path):
    network, scheduler = small_unet(out_channels=2), DDPMScheduler(variance_type="learned_range")
    DDPMPipeline(network, scheduler).save_pretrained(tmp_path / "stock")
    module = DiffusionModule.from_pretrained(tmp_path / "stock")
    assert module.variance == LearnedVariance()
    own = LearnedVariance(weight=0.5, levels=256)
    export(DiffusionModule.from_pretrained(tmp_path / "stock", variance=own), tmp_path / "out")
    assert DiffusionModule.from_pretrained(tmp_path / "out").variance == own
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert IncomingFolder.read(tmp_path / "out").settings(frozen=False)["variance"] == {
        "weight": 0.5,
        "levels": 256,
    }
