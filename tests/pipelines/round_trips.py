"""Models of each kind that goes out, and a process without this package that samples from them."""

import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, EulerDiscreteScheduler
from diffusers.utils import dynamic_modules_utils
from lightning.pytorch import seed_everything
from safetensors import safe_open
from support.forks import exit_code
from support.gaussian_reverse import scheduler
from support.latents import save_autoencoder
from support.networks import small_unet
from support.trainers import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_vr import (
    DDPM,
    EDM,
    VE,
    VP,
    AutoencoderFolder,
    Cosine,
    DiffusersSchedule,
    DiffusersSolver,
    DiffusionModule,
    Euler,
    LatentDiffusionModule,
    LearnedVariance,
    RectifiedFlow,
    Sampler,
    export,
)
from lightning_vr.process.solvers.row_noise import RowNoise

STEPS = 8
GIVEN = [60.0, 30.0, 12.0, 4.0, 1.5, 0.6, 0.2, 0.05]
"""As many noise levels as steps, which no scheduler would choose."""

COUNT = 4
SEED = 3
ABROAD = (
    f"STEPS, COUNT, SEED = {STEPS}, {COUNT}, {SEED}"
    + """
import sys
import torch
sys.modules["lightning_vr"] = None  # importing it raises
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

folder, names = sys.argv[1], sys.argv[2:]
for name in names:
    pipeline = DiffusionPipeline.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    asked = {"num_inference_steps": STEPS, "generator": generator, "output_type": "pt"}
    kind = type(pipeline).__name__
    if kind == "DenoisingPipeline":
        asked["output_type"] = "latent" if pipeline.vae is None else "pt"
        if pipeline.config.num_classes:
            asked["class_labels"] = [0, 1, 2, 0]
    if kind == "DiTPipeline":
        assert pipeline.get_label_ids(["999"]) == [999]
        del asked["output_type"]
        images = pipeline([0, 1, 2, 0], guidance_scale=2.5, output_type="pt", **asked).images
    else:
        images = pipeline(COUNT, **asked).images
    save_file({"images": images}, f"{folder}/{name}.safetensors", {"kind": kind})
"""
)


@dataclass(frozen=True)
class AtLevels(Sampler):
    """Euler's method at given noise levels: at a scheduler's own it is DDIM with eta 0."""

    levels: torch.Tensor | None = None

    def noise_levels(self, schedule):
        return self.levels


class Latents(DiffusionModule):
    """A model of what is no picture."""

    def decode(self, x0):
        return x0.mean(dim=1, keepdim=True)


def trained(module, steps=2, *callbacks, channels=1):
    """Return a module after a few steps on noise."""
    with torch.random.fork_rng():
        seed_everything(0, verbose=False)
        data = 0.5 * torch.randn(32, channels, 8, 8), torch.arange(32) % 3
        loader = DataLoader(TensorDataset(*data), batch_size=16)
        options = {"limit_val_batches": 1, "num_sanity_val_steps": 0, "val_check_interval": 1}
        trainer = quiet_trainer(*callbacks, max_steps=steps, **options)
        trainer.fit(module, loader, loader)
    return module


def latent_dit(folder, **settings):
    """A DiT of twice the channels, as those that are published, of latents of pictures."""
    if not folder.exists():
        save_autoencoder(folder)
    network = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=1,
        sample_size=4,
        norm_num_groups=1,
    )
    options = {"schedule": scheduler(100), "prediction": "epsilon", "num_classes": 1000}
    options |= {"autoencoder": AutoencoderFolder(str(folder)), "label_dropout": 0.3}
    return LatentDiffusionModule(network, **(options | settings))


def models(folder):
    """Models that go out, by name."""
    sampler = Sampler(Euler(), STEPS)
    dit = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    )
    wide = {"in_channels": 4, "out_channels": 4}
    guided = {"num_classes": 3, "label_dropout": 0.3}
    kinds = {
        "epsilon": (VP(), "epsilon"),
        "v": (Cosine(), "v"),
        "x0": (VP(), "x0"),
        "flow": (RectifiedFlow(), "velocity"),
        "edm": (EDM(embedding_scale=1.0), "edm"),
        "edm_1000": (EDM(), "edm"),
        "ve": (VE(), "edm"),
        "euler": (DiffusersSchedule(EulerDiscreteScheduler()), "epsilon"),
    }
    found = {
        name: trained(DiffusionModule(small_unet(), schedule=s, prediction=p, sampler=sampler))
        for name, (s, p) in kinds.items()
    }
    found["classes"] = trained(
        DiffusionModule(
            small_unet(num_class_embeds=4),
            sampler=Sampler(Euler(), STEPS, guidance=2.5),
            **guided,
        )
    )
    flow = {"schedule": RectifiedFlow(), "prediction": "velocity"}
    # what it says about the variance is not trained, and left out
    found["dit"] = trained(DiffusionModule(dit, **flow, num_classes=3, sampler=sampler))
    latents = {"schedule": Cosine(), "prediction": "v", "sampler": sampler}
    found["latents"] = trained(Latents(small_unet(**wide), **latents), channels=4)
    for name, grid in (("exponential", "exponential"), ("given", GIVEN)):
        drawn = Sampler(Euler(), None if grid is GIVEN else STEPS, grid=grid)
        found[name] = trained(DiffusionModule(small_unet(), schedule=EDM(), sampler=drawn))
    drawn = Sampler(Euler(), STEPS, guidance=2.5)
    own = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    # settings by place are those that diffusers forgets
    ddim = DDIMScheduler(80, clip_sample=False, timestep_spacing="trailing", **own)
    drawn = {"sampler": drawn, "schedule": ddim, "prediction": "v"}
    found["latent dit"] = trained(latent_dit(folder, **drawn))
    drawn = Sampler(DDPM(), STEPS, guidance=2.5)
    learned = {"sampler": drawn, "variance": LearnedVariance()}
    found["latent dit, variance"] = trained(latent_dit(folder, **learned))
    return found | with_steps_of_ddpm()


def with_steps_of_ddpm():
    """Models whose solver is DDPM, with a learned variance and with a fixed one."""
    learned, clipped = {"variance": LearnedVariance(weight=1.0)}, {"clip_sample": True}
    by_class = {"num_classes": 3, "label_dropout": 0.3, "schedule": scheduler(100, "linear")}
    kinds = {
        "variance": (DDPM(**clipped), {"out_channels": 2}, learned),
        "beta": (DDPM("beta", **clipped), {}, {}),
        "beta_tilde": (DDPM("beta_tilde", **clipped), {}, {}),
        "guided variance": (
            DDPM(),
            {"out_channels": 2, "num_class_embeds": 4},
            learned | by_class | {"sampler": Sampler(DDPM(), STEPS, guidance=2.5)},
        ),
    }
    found = {}
    for name, (solver, network, options) in kinds.items():
        own = {"schedule": scheduler(100), "sampler": Sampler(solver, STEPS)} | options
        module = DiffusionModule(small_unet(**network), prediction="epsilon", **own)
        found[name] = trained(module)
    return found


def expected(module):
    """Return ``module.sample`` at the noise levels of its pipeline's scheduler, decoded latents."""
    source = torch.Generator().manual_seed(SEED)
    abroad = module.to_pipeline().scheduler
    with warnings.catch_warnings():  # of diffusers, on numpy 2
        warnings.simplefilter("ignore", DeprecationWarning)
        abroad.set_timesteps(STEPS)
    times = abroad.timesteps.double()
    if isinstance(module.sampler.solver, DDPM):
        levels = None
    elif isinstance(module.schedule, DiffusersSchedule):
        levels = module.schedule.noise_level(times)
    elif type(abroad).__name__ == "EDMEulerScheduler":
        levels = None
    else:
        levels = module.schedule.noise_level(times / 1000)
    guidance = module.sampler.guidance
    if type(abroad).__name__ == "FlowMatchEulerDiscreteScheduler":
        at = Sampler(DiffusersSolver(abroad), STEPS, guidance=guidance)  # begins at noise alone
    else:
        at = AtLevels(Euler(), STEPS, levels=levels, guidance=guidance)
    group = None if module.num_classes is None else [0, 1, 2, 0]
    sampler = module.sampler if levels is None else at
    # diffusers draws the noise of later steps from the generator of the first
    draw = partial(torch.randn, generator=source)
    with mock.patch.object(RowNoise, "like", lambda _, x: draw(x.shape).to(x.dtype)):
        x0 = module.sample(COUNT, group=group, sampler=sampler, source=source)
    return module.decode(x0) if isinstance(module, LatentDiffusionModule) else x0


def sampled_abroad(folder, modules):
    """Return each model's pipeline and samples, of a process that cannot import this package."""
    for name, module in modules.items():
        export(module, folder / name)

    def without_this_package():
        for name in list(sys.modules):
            if name.split(".")[0] == "lightning_vr":
                del sys.modules[name]
        dynamic_modules_utils.HF_MODULES_CACHE = str(folder / "code")
        sys.argv = ["-c", str(folder), *modules]
        warnings.simplefilter("default")
        exec(ABROAD, {})

    assert exit_code(without_this_package, seconds=120) == 0
    return brought_back(folder, modules)


def sampled_in_a_fresh_process(folder, names):
    """As ``sampled_abroad`` for models that went out, of a process that has imported nothing."""
    command = [sys.executable, "-c", ABROAD, str(folder), *names]
    environment = {"HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return brought_back(folder, names)


def brought_back(folder, names):
    """The pipeline and the samples of each name."""
    found = {}
    for name in names:
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            found[name] = file.metadata()["kind"], file.get_tensor("images")
    return found
