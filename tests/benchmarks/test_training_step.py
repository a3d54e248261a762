"""Training steps on the digits: what estimators cost over the plain one."""

import torch
from lightning.pytorch import Trainer
from support.networks import digits_unet

from lightning_vr.data.digits import digits
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.loss import ControlVariate, network_output
from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import DSM
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.estimators.taylor.terms import clean_points, first_term
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.training.control_pilot import control_pilot
from lightning_vr.training.module import DiffusionModule

BATCH_SIZE = 128


def training_step(prepare=None, **settings):
    """A function that trains for one step, as the trainer does."""
    torch.manual_seed(0)
    module = DiffusionModule(digits_unet(), num_classes=10, label_dropout=0.1, **settings)
    images, labels = digits()
    module.target.fill(images, labels, indexed=True)
    optimizer = module.configure_optimizers()
    index = torch.arange(BATCH_SIZE)
    batch = {"image": images[index], "label": labels[index], "index": index}
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.log = lambda *_, **__: None
    run = RunContext.of(module.trainer)
    pilots = module.make_resamples_pilot(run), control_pilot(module, run)
    module._pilots = [pilot for pilot in pilots if pilot is not None]
    if prepare is not None:
        prepare(module)

    module._check_hooks_called = lambda: None

    def step():
        module.on_train_batch_start(batch, 0)
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        module.optimizer_step(0, 0, optimizer)

    return step


def test_a_training_step_with_all_references_against_one_of_dsm(compare):
    ours, other = compare(
        training_step(target=STF("all")),
        training_step(target=DSM()),
        rounds=60,
        label="a training step with references='all' and one of DSM",
    )
    print(f"{ours / other:.3f} times as long")


def test_a_training_step_of_carv_with_a_free_upstream_against_one_of_iid(compare):
    ours, other = compare(
        training_step(draws=CARV("auto")),
        training_step(),
        rounds=100,
        label="a training step with resamples='auto' and one of IID",
    )
    print(f"{ours / other:.4f} times as long")


def test_a_training_step_of_carv_with_a_learned_proposal_against_one_of_iid(compare):
    ours, other = compare(
        training_step(draws=CARV(1, LearnedProposal())),
        training_step(),
        rounds=100,
        label="a training step with a learned proposal and one of IID",
    )
    print(f"{ours / other:.4f} times as long")


def test_a_training_step_with_a_closed_gate_against_one_without_a_control_variate(compare):
    ours, other = compare(
        training_step(control_variate=TaylorCV()),
        training_step(),
        rounds=100,
        label="a training step with a control variate whose gate is closed and one without",
    )
    print(f"{ours / other:.4f} times as long")


def one_stream(module):
    """Draw as usual: from one generator, with no key."""
    stream = torch.Generator().manual_seed(0)
    module.generator = lambda *key: stream


def test_keyed_generators_and_strata_against_one_stream(compare, monkeypatch):
    keyed = training_step(draws=CARV(1))
    plain = training_step(one_stream)

    def other():
        with monkeypatch.context() as patch:
            patch.setattr(
                "lightning_vr.lifecycle.resumable_module.set_global_rng",
                lambda source: lambda: None,
            )
            patch.setattr("lightning_vr.training.module.generator", lambda *_, **__: None)
            plain()

    ours, other = compare(
        keyed,
        other,
        rounds=400,
        label="a training step with keyed generators and strata and one of one stream",
    )
    print(f"{ours / other:.4f} times as long")


def unchecked(module):
    """Take no look at what is finite."""
    module.on_before_optimizer_step = lambda optimizer: None
    module._guard.add_draws = module._guard.add_loss = lambda *_: None


def test_checks_of_what_is_finite_against_none(compare):
    ours, other = compare(
        training_step(),
        training_step(unchecked),
        rounds=400,
        label="a training step with checks of what is finite and one without",
    )
    print(f"{ours / other:.4f} times as long")


class TwoPasses(ControlVariate):
    """Order 0 as it is usually written: the clean samples pass by themselves."""

    def forward(self, network, noised, target, objective):
        output = network_output(network, noised, objective)
        clean = network_output(network, clean_points(noised), objective)
        return output, -first_term(clean, noised, objective)[:, 0]


def test_order_0_in_one_batch_against_two_passes(compare):
    ours, other = compare(
        training_step(control_variate=TaylorCV(gate="open", coefficient=1.0)),
        training_step(control_variate=TwoPasses()),
        rounds=40,
        label="a training step with order 0 in one batch and one with two passes",
    )
    print(f"{ours / other:.4f} times as long")


def test_order_0_against_a_step_without_it(compare):
    ours, other = compare(
        training_step(control_variate=TaylorCV(gate="open", coefficient=1.0)),
        training_step(),
        rounds=40,
        label="a training step with order 0 and one without",
    )
    print(f"{ours / other:.4f} times as long")
