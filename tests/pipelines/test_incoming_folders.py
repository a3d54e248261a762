"""Folders of diffusers are trained on, and go out again."""

import json

import pytest
import torch
import yaml
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from round_trips import trained
from safetensors.torch import load_file, save_file
from support.networks import small_unet

from lightning_vr import EDM, VE, VP, DiffusersSchedule, Diffusion, DiffusionModule, Sampler, export
from lightning_vr.cli import main
from lightning_vr.training import hand_over
from lightning_vr.training.incoming_folder import IncomingFolder

STOCK = {
    "DDPM": (DDPMScheduler(prediction_type="v_prediction", clip_sample=False), "v"),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), "velocity"),
}


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_folder_comes_in_trains_and_goes_out_to_the_stock_pipeline(tmp_path, name):
    scheduler, prediction = STOCK[name]
    DDPMPipeline(small_unet(), scheduler).save_pretrained(tmp_path / "stock")
    module = DiffusionModule.from_pretrained(tmp_path / "stock", sampler=Sampler(steps=4))
    assert module.sampler.steps == 4
    assert module.prediction == prediction
    assert isinstance(module.schedule, DiffusersSchedule)
    found = module.schedule.scheduler.config
    assert {x: found[x] for x in found if x[0] != "_"} == {
        x: y for x, y in scheduler.config.items() if x[0] != "_"
    }
    before = {name: x.clone() for name, x in module.network.state_dict().items()}
    assert all(torch.equal(x, small_unet().state_dict()[name]) for name, x in before.items())
    export(trained(module), tmp_path / "out")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline.scheduler) is type(scheduler)
    after = pipeline.unet.state_dict()
    assert all(torch.equal(after[name], x) for name, x in module.network.state_dict().items())
    assert any(not torch.equal(after[name], x) for name, x in before.items())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(2, num_inference_steps=2, output_type="pt").images.isfinite().all()


OWN = {
    "EDM": {"schedule": EDM(0.01, 40.0, embedding_scale=1.0), "sigma_data": 0.7},
    "EDM at 1000": {"schedule": EDM(), "num_classes": 3, "label_dropout": 0.2},
    "VE": {"schedule": VE(0.02, 30.0)},
    "VP": {"schedule": VP(beta_max=18.0), "prediction": "epsilon"},
}


@pytest.mark.parametrize("name", OWN)
def test_what_went_out_comes_in_as_it_was(tmp_path, name):
    classes = {"num_class_embeds": 4} if "num_classes" in OWN[name] else {}
    module = DiffusionModule(small_unet(**classes), **OWN[name])
    export(module, tmp_path / "out")
    again = DiffusionModule.from_pretrained(tmp_path / "out")
    assert type(again.schedule) is type(module.schedule)
    for setting in ("sigma_min", "sigma_max", "embedding_scale", "beta_min", "beta_max"):
        assert getattr(again.schedule, setting, None) == getattr(module.schedule, setting, None)
    for setting in ("prediction", "sigma_data", "num_classes", "label_dropout"):
        assert getattr(again, setting) == getattr(module, setting)
    x, t = torch.randn(2, 1, 8, 8), again.schedule.time(torch.tensor([0.5, 5.0]))
    module.eval(), again.eval()
    assert torch.equal(again.denoise(x, t), module.denoise(x, t))


def test_the_scheduler_alone_decides_where_a_folder_does_not_say_more(tmp_path):
    own = {"VP": "epsilon", "EDM": "edm"}
    modules = {
        "VP": DiffusionModule(small_unet(), schedule=VP(), prediction="epsilon"),
        "EDM": DiffusionModule(small_unet(), schedule=EDM(embedding_scale=1.0), sigma_data=0.7),
    }
    x, s = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0])
    for name, module in modules.items():
        export(module, tmp_path / name)
        (tmp_path / name / "lightning_vr.json").unlink()
        again = Diffusion(**IncomingFolder.read(tmp_path / name).arguments())
        assert again.prediction == own[name]
        found, wanted = (each.eval().denoise(x, each.schedule.time(s)) for each in (again, module))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_command_line_begins_with_a_folder_and_resumes_without_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheduler = DDIMScheduler(trained_betas=[0.1, 0.2, 0.3, 0.4], num_train_timesteps=4)
    DDIMPipeline(small_unet(), scheduler).save_pretrained("stock")
    save_last = {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}}
    settings = {
        "pretrained": "stock",
        "model": {"init_args": {"optimizer": {"class_path": "SGD", "init_args": {"lr": 1e-12}}}},
        "data": {"class_path": "Digits"},
        "trainer": {
            "max_steps": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "callbacks": save_last,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", "run.yaml"])
    (tmp_path / "stock").rename(tmp_path / "gone")
    config = "runs/version_0/config.yaml"
    found = yaml.safe_load((tmp_path / config).read_text())["model"]["init_args"]
    assert found["prediction"] == "epsilon"
    assert found["optimizer"]["class_path"].endswith("SGD")
    main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "2"])
    main(["export", "--ckpt_path", "last", "--output", "out"])
    pipeline = DDIMPipeline.from_pretrained("out")
    assert pipeline.scheduler.config.trained_betas == [0.1, 0.2, 0.3, 0.4]
    for name, value in small_unet().state_dict().items():
        torch.testing.assert_close(pipeline.unet.state_dict()[name], value, rtol=0, atol=1e-6)
    card = (tmp_path / "out/README.md").read_text()
    assert "- Optimizer steps: 2\n- Seed: 0\n- Data: Digits\n" in card
    assert "class_path: lightning_vr" in card


def broken(folder, what):
    """Write a folder that is no good for a reason."""
    scheduler = DDPMScheduler()
    if what == "sign":
        scheduler = EDMEulerScheduler(prediction_type="v_prediction")
    DDPMPipeline(small_unet(), scheduler).save_pretrained(folder)
    if what == "weights":
        next((folder / "unet").glob("*.safetensors")).unlink()
    if what == "scheduler":
        (folder / "scheduler" / "scheduler_config.json").unlink()
    if what == "variance":
        (folder / "lightning_vr.json").write_text(
            json.dumps({"schedule": {"class_path": "DiffusersSchedule"}, "variance": [1]})
        )
    if what in ("class", "settings"):
        path = folder / "unet" / "config.json"
        config = json.loads(path.read_text()) | {"_class_name": "DDPMPipeline"}
        path.write_text(json.dumps(config if what == "class" else [1]))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("sign", "`prediction_type` of an EDMEulerScheduler"),
        ("weights", "must have the weights of the network as safetensors"),
        ("scheduler", "with a `scheduler` and either"),
        ("class", "holds a DDPMPipeline"),
        ("settings", "holds no settings"),
        ("variance", r"says \[1\] of `variance`"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused_in_one_line(tmp_path, what, reason):
    broken(tmp_path, what)
    with pytest.raises(ValueError, match=reason) as refused:
        DiffusionModule.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_weights_of_a_network_of_another_size_are_refused(tmp_path):
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    folder = IncomingFolder.read(tmp_path / "stock")
    with pytest.raises(ValueError, match="leave the settings of `network` out"):
        folder.load_weights(small_unet(block_out_channels=(16,)))


def test_a_setting_that_the_weights_were_not_trained_with_is_warned_of(tmp_path):
    export(DiffusionModule(small_unet(), sigma_data=0.6), tmp_path / "out")
    arguments = ["--pretrained", str(tmp_path / "out"), "--model.sigma_data", "0.7"]
    with (
        pytest.warns(UserWarning, match="`model.sigma_data` is 0.7, but 0.6 in"),
        pytest.raises(SystemExit),  # as there are no data
    ):
        main(["fit", *arguments])


def test_a_module_from_elsewhere_says_what_to_import_before_it_is_handed_over(monkeypatch):
    monkeypatch.setattr(hand_over, "_functions", {})
    with pytest.raises(RuntimeError, match=r"`lightning_vr\.pipelines` must be imported before"):
        DiffusionModule(small_unet()).to_pipeline()


def test_a_folder_that_lacks_a_weight_is_refused_and_not_filled_at_random(tmp_path):
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"`pretrained` must have the weights of .* lacks conv_in"):
        DiffusionModule.from_pretrained(tmp_path)
