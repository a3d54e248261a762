"""What goes out samples elsewhere as it does here."""

import json

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from lightning.pytorch import Callback
from round_trips import (
    expected,
    models,
    sampled_abroad,
    sampled_in_a_fresh_process,
    trained,
)
from safetensors.torch import load_file
from support.networks import small_mlp, small_unet

from lightning_vr import (
    DDPM,
    EMA,
    VE,
    VP,
    Cosine,
    DiffusersSchedule,
    DiffusionModule,
    RectifiedFlow,
    Sampler,
    export,
)
from lightning_vr.pipelines.outgoing_schedulers import outgoing_scheduler

UNET = small_unet()
STOCK = {"epsilon": "DDIMPipeline", "v": "DDIMPipeline", "x0": "DDIMPipeline"}
STOCK |= dict.fromkeys(["flow", "variance", "beta", "beta_tilde"], "DDPMPipeline")
OTHERS = ["edm", "edm_1000", "ve", "euler", "classes", "dit", "latents"]
OTHERS += ["exponential", "given", "guided variance", "latent dit, variance"]
STOCK["latent dit"] = "DiTPipeline"


@pytest.fixture(scope="module")
def trip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    modules = models(tmp_path_factory.mktemp("in") / "vae")
    return folder, modules, sampled_abroad(folder, modules)


@pytest.mark.parametrize("name", [*STOCK, *OTHERS])
def test_a_process_without_this_package_draws_the_samples_of_the_module(trip, name):
    _, modules, abroad = trip
    kind, images = abroad[name]
    assert kind == STOCK.get(name, "DenoisingPipeline")
    wanted = expected(modules[name])
    # an untrained network for epsilon makes samples of size alpha^-1 at the first step
    tolerance = 1e-4 * max(1.0, float(wanted.std()))
    if name in STOCK or name.startswith("latent dit"):
        wanted = (wanted / 2 + 0.5).clamp(0, 1)
    assert wanted.std() > 0.05
    torch.testing.assert_close(images, wanted, rtol=0, atol=tolerance)


@pytest.mark.slow  # imports diffusers again
def test_a_fresh_process_draws_the_same(trip):
    folder, modules, abroad = trip
    fresh = sampled_in_a_fresh_process(folder, list(modules))
    for name, (kind, images) in abroad.items():
        assert fresh[name][0] == kind
        assert torch.equal(fresh[name][1], images)


def test_nothing_is_pickled(trip):
    folder, modules, _ = trip
    files = [path for name in modules for path in (folder / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".py"}


def test_a_card_says_how_to_load_the_folder_and_what_is_in_it(trip):
    folder, *_ = trip
    card = (folder / "classes" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "class_labels=[0, 1, 2]" in card
    assert "- Weights: trained\n- Optimizer steps: 2\n" in card
    assert "- draws: IID\n- target: DSM" in card
    assert "1000 t + 0" in card
    stock = (folder / "flow" / "README.md").read_text()
    assert "trust_remote_code" not in stock
    line = next(x for x in stock.splitlines() if x.startswith("pipeline ="))
    loaded = {"folder": str(folder / "flow")}
    exec(
        f"from diffusers import DiffusionPipeline\n{line}".replace(
            '"path/to/this/folder"', "folder"
        ),
        loaded,
    )
    assert type(loaded["pipeline"]).__name__ == "DDPMPipeline"


def test_a_card_says_what_of_the_sampler_its_pipeline_does_not_follow(trip, tmp_path):
    folder, *_ = trip
    assert "does not follow" not in (folder / "given" / "README.md").read_text()
    sampler = Sampler(grid=[5.0, 1.0], guidance_rescale=0.5)
    export(DiffusionModule(UNET, schedule=VP(), prediction="v", sampler=sampler), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "does not follow `grid` and `guidance_rescale` of the model's sampler." in card


@pytest.mark.parametrize("schedule", [VP(), Cosine()])
def test_the_table_of_a_scheduler_has_the_noise_levels_of_the_schedule(schedule):
    module = DiffusionModule(small_unet(), schedule=schedule, prediction="v")
    table = DiffusersSchedule(outgoing_scheduler(module.objective, module.sampler).scheduler)
    t = torch.arange(1, 1000, dtype=torch.float64)
    found, wanted = table.noise_level(t), schedule.noise_level(t / 1000)
    # float32 keeps 6e-8 of 1 - beta
    floor = 1e-7 / wanted**2
    assert bool(((found / wanted - 1).abs() < 1e-4 + floor).all())


class Asking(Callback):
    """Asks for a pipeline at moments of a fit, and keeps the average of that moment."""

    def __init__(self):
        self.pairs = []

    def ask(self, module):
        found = module.to_pipeline().unet.state_dict()
        self.pairs.append((found, self.average))

    def on_train_batch_end(self, trainer, module, *_):
        (callback,) = (c for c in trainer.callbacks if isinstance(c, EMA))
        average = callback._average_model.weights[0]
        self.average = {n.removeprefix("network."): x.clone() for n, x in average.items()}
        self.ask(module)

    def on_validation_start(self, trainer, module):
        self.ask(module)

    def on_validation_batch_end(self, trainer, module, *_):
        self.ask(module)

    def on_validation_epoch_end(self, trainer, module):
        self.ask(module)


def test_averaged_weights_go_out_during_a_fit_after_it_and_from_its_checkpoint(tmp_path):
    from lightning_vr.cli.vr_trainer import VRTrainer

    asking, average = Asking(), EMA(decay=0.5)
    module = DiffusionModule(small_unet(), schedule=VP(), prediction="v")
    trained(module, 3, average, asking)
    assert len(asking.pairs) == 3 * 4
    for found, wanted in asking.pairs:
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    path = tmp_path / "averaged.ckpt"
    module.trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    fresh = DiffusionModule(small_unet(), schedule=VP(), prediction="v")
    VRTrainer(accelerator="cpu", logger=False).export(fresh, str(tmp_path / "out"), ckpt_path=path)
    written = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    export(module, tmp_path / "again")
    again = load_file(tmp_path / "again/unet/diffusion_pytorch_model.safetensors")
    for name, value in written.items():
        assert torch.equal(value, saved["state_dict"][f"network.{name}"])
        assert torch.equal(value, again[name])
    for folder in ("out", "again"):
        assert "Weights: averaged" in (tmp_path / folder / "README.md").read_text()


def test_a_compiled_network_goes_out_under_plain_names(tmp_path):
    module = DiffusionModule(
        torch.compile(small_unet(), backend="eager"), schedule=VP(), prediction="v"
    )
    export(module, tmp_path / "plain", "safetensors")
    export(module, tmp_path / "pipeline")
    plain = load_file(tmp_path / "plain/model.safetensors")
    assert plain.keys() == small_unet().state_dict().keys()
    other = load_file(tmp_path / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert other.keys() == plain.keys()


def test_plain_weights_come_with_what_they_were_trained_for(tmp_path):
    module = DiffusionModule(small_mlp(std=0.1), schedule=VP(beta_max=5.0), prediction="x0")
    export(module, tmp_path, "safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["network"]["class_path"].endswith("ResidualMLP")
    assert settings["schedule"]["init_args"] == {"beta_min": 0.1, "beta_max": 5.0}
    network = small_mlp()
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(network.project_out.weight, module.network.project_out.weight)


class Own(VP):
    """A schedule that says of no timestep what it is."""


class OwnCall(DiffusionModule):
    def predict(self, x, noised):
        return self.network(x, noised.t).sample


REFUSED = {
    "`prediction` must be 'edm'": {"schedule": VE(), "prediction": "epsilon"},
    "`prediction` must be 'velocity'": {"schedule": RectifiedFlow(), "prediction": "v"},
    "`prediction` must be 'epsilon' or": {"schedule": VP(), "prediction": "score"},
    "`t_min` and `t_max` of Cosine": {"schedule": Cosine(t_max=0.9), "prediction": "v"},
    "got Own, for which": {"schedule": Own(), "prediction": "v"},
    "must have the table of a DDPMScheduler": {
        "schedule": CogVideoXDDIMScheduler(rescale_betas_zero_snr=False),
        "prediction": "epsilon",
        "sampler": Sampler(DDPM("beta")),
    },
    "or twice as many, to be exported": {"network": small_unet(out_channels=3)},
    "must be a model of diffusers": {"network": small_mlp()},
    "`sample_size` of the network": {"network": small_unet(sample_size=None)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_pipeline_would_sample_rightly_is_refused(reason, tmp_path):
    module = DiffusionModule(**({"network": UNET} | REFUSED[reason]))
    with pytest.raises(ValueError, match=reason) as refused:
        export(module, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_network_that_is_called_in_its_own_way_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`predict` must not be overridden"):
        export(OwnCall(UNET), tmp_path / "out")


def test_a_folder_with_files_is_not_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="`output` must be a new or empty folder"):
        export(DiffusionModule(UNET), tmp_path)
