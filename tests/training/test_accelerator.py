"""On a CUDA device: nothing that measures disturbs training, and stopping changes nothing.

Compared with the same on the CPU, or with a run of the device that is bitwise repeatable.
"""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from support.comparisons import assert_equal, logs
from support.networks import small_unet
from support.stops import StopAt, StoppedError
from support.trainers import quiet_trainer
from torch import multiprocessing

from lightning_vr import (
    CARV,
    EMA,
    STF,
    DiffusionModule,
    FrechetDistance,
    GradientVariance,
    LearnedProposal,
    References,
    ResidualMLP,
    SampleGrid,
    TargetVariance,
    TaylorCV,
    audit,
    posterior_mean,
)
from lightning_vr.cli import main
from lightning_vr.core.rng import generator
from lightning_vr.data import Digits, EightGaussians
from lightning_vr.posterior.sharded_references import ShardedReferences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    # what saves is not what resumes
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),
    # torch loads its compiler with it, nothing of ours
    pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated"),
]

SLOTS = {
    "plain": dict,
    "stf-batch": lambda: {"target": STF("batch")},
    "stf": lambda: {"target": STF(256)},
    "stf-all": lambda: {"target": STF("all")},
    "carv": lambda: {"draws": CARV(2, LearnedProposal(), antithetic=True)},
    "chunks": lambda: {"draws": CARV(4, chunk_size=64)},
    "taylor": lambda: {"control_variate": TaylorCV(gate="open", refit_every_n_steps=3)},
}


def network():
    return small_unet(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )


def build(slots):
    return DiffusionModule(
        network(),
        num_classes=10,
        label_dropout=0.1,
        sigma_data=0.75,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        **SLOTS[slots](),
    )


def watchers(slots):
    measured = TargetVariance(references=[16], noise_levels=3, samples=64)
    return [
        GradientVariance(every_n_steps=2, samples=4, noise_levels=2),
        FrechetDistance(samples=80),
        SampleGrid(samples=4),
        *([] if slots == "taylor" else [measured]),
    ]


def fit(folder, slots, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(0)
    module = build(slots)
    settings = {"max_steps": 7, "max_epochs": -1, "deterministic": True}
    trainer = gpu_trainer(
        EMA(decay=0.9),
        *callbacks,
        logger=CSVLogger(folder, name=""),
        log_every_n_steps=1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        **settings | options,
    )
    trainer.fit(module, Digits(batch_size=64), ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return torch.load(folder / "end.ckpt", weights_only=True, map_location="cpu")


def gpu_trainer(*callbacks, **options):
    return quiet_trainer(*callbacks, accelerator="gpu", devices=1, **options)


@pytest.fixture(autouse=True)
def as_before():
    """What deterministic trainers change."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("slots", SLOTS)
def test_a_run_is_bitwise_that_without_callbacks(tmp_path, slots, precision):
    bare = fit(tmp_path / "bare", slots, precision=precision)
    watched = fit(tmp_path / "watched", slots, *watchers(slots), precision=precision)
    assert_equal(watched["state_dict"], bare["state_dict"])
    assert_equal(watched["optimizer_states"], bare["optimizer_states"])
    found = logs(tmp_path / "watched")
    assert any("gradient_variance" in name for _, name in found)
    assert any("frechet_distance" in name for _, name in found)


@pytest.mark.parametrize("slots", SLOTS)
def test_a_run_that_is_stopped_and_resumed_is_bitwise_the_whole_one(tmp_path, slots):
    options = {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    whole = fit(tmp_path / "whole", slots, *watchers(slots), **options)
    path = tmp_path / "stopped.ckpt"
    stop = StopAt("on_train_batch_end", 7, path)
    with pytest.raises(StoppedError):
        fit(tmp_path / "parts", slots, *watchers(slots), stop, **options)
    resumed = fit(tmp_path / "parts", slots, *watchers(slots), ckpt_path=path, **options)
    for part in ("state_dict", "optimizer_states", "lightning_vr", "callbacks"):
        if part == "callbacks":
            whole[part] = {k: v for k, v in whole[part].items() if not k.startswith("StopAt")}
        assert_equal(resumed[part], whole[part], part)


@pytest.mark.parametrize("slots", ["plain", "chunks"])
def test_torchs_compiler_trains_as_without_it(slots):
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        points = ResidualMLP(2, width=32, depth=1)
        start = torch.nn.utils.parameters_to_vector(points.parameters()).detach().clone()
        module = DiffusionModule(
            torch.compile(points) if compiled else points,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            **SLOTS[slots](),
        )
        module.seed = 0
        gpu_trainer(max_steps=3).fit(module, EightGaussians(64, num_samples=256, num_validation=64))
        end = torch.nn.utils.parameters_to_vector(points.parameters()).detach().cpu()
        found.append(end - start)
    plain, compiled = found
    assert (compiled - plain).norm() < 1e-3 * plain.norm()
    assert plain.norm() > 0


def test_an_audit_measures_on_the_device():
    trainer = gpu_trainer(precision="bf16-mixed")
    found = audit(build("plain"), Digits(batch_size=64), budget=5, trainer=trainer, progress=False)
    assert not any("functorch" in reason for reason in found.skipped.values())
    names = [each.name for each in found.estimators]
    assert {"current", 'STF("all")', "pairs"} <= set(names)
    for each in found.estimators:
        assert each.efficiency.low <= each.efficiency.estimate <= each.efficiency.high
        assert 0 < each.seconds < 1
    assert found.cost.denoise > 0
    assert found.advice


@pytest.mark.parametrize("config", ["digits_stf", "digits_carv"])
def test_the_command_line_trains_there_by_itself(tmp_path, monkeypatch, config, pytestconfig):
    file = pytestconfig.rootpath / f"configs/{config}.yaml"
    monkeypatch.chdir(tmp_path)
    short = "--trainer.max_steps=50 --trainer.precision=bf16-mixed --trainer.deterministic=true"
    main(["fit", f"--config={file}", *short.split(), "--trainer.enable_progress_bar=false"])
    (run,) = tmp_path.glob("runs/*/version_0")
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["network.conv_in.weight"].device.type == "cuda"
    main(
        [
            "predict",
            f"--config={file}",
            f"--ckpt_path={run}/checkpoints/last.ckpt",
            "--num_samples=10",
            "--trainer.enable_progress_bar=false",
        ]
    )


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_weights_are_those_of_float64_whatever_precision_matrices_may_have(allowed):
    source = generator("tf32", device="cuda")
    x0 = torch.randn(500, 3072, generator=source, device="cuda")
    sigma = torch.linspace(0.5, 40, 64, device="cuda")
    xt = x0[:64] + sigma[:, None] * torch.randn(64, 3072, generator=source, device="cuda")
    exact = posterior_mean(xt.double(), 1.0, sigma.double(), x0.double())
    kept = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(allowed)
        with torch.autocast("cuda", torch.bfloat16):
            found = posterior_mean(xt, 1.0, sigma, References.prepare(x0))
    finally:
        torch.set_float32_matmul_precision(kept)
    torch.testing.assert_close(found.mean.double(), exact.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.ess.double(), exact.ess, rtol=1e-2, atol=1e-3)
    cpu = posterior_mean(xt.cpu(), 1.0, sigma.cpu(), x0.cpu())
    torch.testing.assert_close(found.mean.cpu(), cpu.mean, rtol=1e-3, atol=1e-3)


def _on_rank(rank, folder):
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    x0, xt, sigma = _problem()
    own = slice(None, 5) if rank == 0 else slice(5, None)
    shards = ShardedReferences.prepare(x0[rank::2], None)
    found = posterior_mean(xt[own], 1.0, sigma[own], shards)
    torch.save(found.mean.cpu(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _problem():
    source = generator("shards", device="cuda")
    x0 = torch.randn(101, 12, generator=source, device="cuda")
    xt = x0[:12] + torch.randn(12, 12, generator=source, device="cuda")
    return x0, xt, torch.linspace(0.5, 3, 12, device="cuda")


def test_two_processes_that_share_out_references_on_a_device_agree_with_one(tmp_path):
    multiprocessing.start_processes(_on_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    found = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    x0, xt, sigma = _problem()
    expected = posterior_mean(xt, 1.0, sigma, x0).mean.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
