"""Training steps of a U-Net for CIFAR-10 on a GPU: what estimators cost over the plain one."""

import pytest
import torch
from diffusers import UNet2DModel
from lightning.pytorch import Trainer

from lightning_vr import CARV, DSM, STF, DiffusionModule, LearnedProposal
from lightning_vr.core.rng import generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

BATCH_SIZE, IMAGES, ROUNDS = 128, 50_000, 20


@pytest.fixture(scope="module")
def images():
    source = generator("images", device="cuda")
    return torch.rand(IMAGES, 3, 32, 32, generator=source, device="cuda").mul_(2).sub_(1)


@pytest.fixture(scope="module")
def network():
    """The U-Net of DDPM for CIFAR-10, 36 million parameters."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).cuda()


def training_step(network, images, **settings):
    """A function that trains for one step in bfloat16, and waits for the device."""
    module = DiffusionModule(network, **settings).cuda()
    module.seed = 0
    if module.target.bank_size != 0:
        module.target.fill(images, None, indexed=True)
    module.trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module.log = lambda *_, **__: None
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    index = torch.arange(BATCH_SIZE, device="cuda")
    batch = {"image": images[:BATCH_SIZE], "index": index}

    def step():
        with module.trainer.precision_plugin.forward_context():
            loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        module.optimizer_step(0, 0, optimizer)
        torch.cuda.synchronize()

    return step


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("STF('batch')", lambda: {"target": STF("batch")}),
        ("STF(4096)", lambda: {"target": STF(4096)}),
        ("STF('all')", lambda: {"target": STF("all")}),
        ("CARV(1)", lambda: {"draws": CARV(1)}),
        ("CARV(1, LearnedProposal())", lambda: {"draws": CARV(1, LearnedProposal())}),
    ],
)
def test_a_training_step_against_the_plain_one(compare, network, images, name, settings):
    ours, other = compare(
        training_step(network, images, **settings()),
        training_step(network, images, target=DSM()),
        rounds=ROUNDS,
        label=f"a training step with {name} and the plain one",
    )
    print(f"{ours / other:.3f} times as long")
