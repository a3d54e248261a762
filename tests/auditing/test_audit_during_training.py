"""Audits within a run: they change nothing of it, and say what pays when."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from support.trainers import quiet_trainer

from lightning_vr import (
    CARV,
    STF,
    AuditDuringTraining,
    Candidate,
    DiffusionModule,
    LearnedProposal,
    ResidualMLP,
)
from lightning_vr.auditing import audit_during_training as watching
from lightning_vr.data import EightGaussians

RIVALS = [
    Candidate("all", target=STF("all")),
    Candidate("q", draws=CARV(1, LearnedProposal(bins=2))),
]


def trained(*callbacks, steps=30, folder=None, ckpt_path=None):
    torch.manual_seed(0)
    network = ResidualMLP(width=16, depth=1)
    torch.nn.init.normal_(network.project_out.weight, std=0.1)
    module = DiffusionModule(network, draws=CARV(1, LearnedProposal(bins=2)))
    logger = CSVLogger(folder, name="", version="run") if folder else False
    options = {"logger": logger, "limit_val_batches": 0, "log_every_n_steps": 1}
    trainer = quiet_trainer(*callbacks, max_steps=steps, **options)
    data = EightGaussians(batch_size=32, num_samples=160, num_validation=32)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module, torch.get_rng_state()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two audits, and what it left."""
    folder = tmp_path_factory.mktemp("run")
    watch = AuditDuringTraining(RIVALS, every_n_steps=10, repetitions=3)
    return folder, watch, *trained(watch, folder=folder)


def test_the_run_is_bitwise_the_same_with_and_without(run):
    _, _, trainer, module, state = run
    other, plain, plain_state = trained()
    assert torch.equal(state, plain_state)
    for name, value in plain.state_dict().items():
        found = module.state_dict()[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(found, value), name
    assert torch.equal(module.draws.proposal.table, plain.draws.proposal.table)
    states = (each.optimizers[0].state_dict()["state"] for each in (trainer, other))
    for first, second in zip(*(s.values() for s in states), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_each_audit_leaves_rows_and_the_end_says_what_paid_early_and_late(run):
    folder, watch, trainer, *_ = run
    with (folder / "run/audit_during_training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["candidate"] for row in rows] == ["all", "q", "all", "q"]
    assert len(watch.history) == 2
    assert all(float(row["efficiency_low"]) < float(row["efficiency_high"]) for row in rows)
    assert float(rows[0]["efficiency"]) > 1.1
    said = watch.history.summary()
    assert "at step 10, noise over signal" in said
    assert "at step 20, noise over signal" in said
    assert set(trainer.callback_metrics) >= {"audit/noise_ratio", "audit/saving/all"}


def test_a_checkpoint_keeps_what_was_found(run, tmp_path):
    _, watch, trainer, *_ = run
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = AuditDuringTraining(RIVALS, every_n_steps=35, repetitions=3)
    trained(again, steps=50, ckpt_path=tmp_path / "a.ckpt")
    assert again.history.state()[:2] == watch.history.state()
    assert [audit["step"] for audit in again.history.state()] == [10, 20, 35]


def test_audits_take_two_percent_of_the_time_of_a_run(monkeypatch):
    """A batch takes a second of training, and a batch that an audit takes 100 seconds."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(watching, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    watch = AuditDuringTraining(RIVALS, repetitions=3)
    module = DiffusionModule(ResidualMLP())
    trainer = SimpleNamespace(global_step=0)

    def audit(trainer, module, batch):
        now.seconds += 100
        watch._comparison = None if watch._comparison else object()
        watch._audited_step = trainer.global_step
        begun.append(trainer.global_step)

    begun = []
    monkeypatch.setattr(watch, "_audit", audit)
    for step in range(40_000):
        trainer.global_step = step
        watch.on_train_batch_start(trainer, module, None, step)
        now.seconds += 1
    # at first it is taken to need 2 * 8 * 3 * 3 steps, then 200 seconds
    assert begun[0] == pytest.approx(144 / 0.02, abs=20)
    assert begun[2] == pytest.approx(400 / 0.02, abs=20)
    assert 100 * len(begun) <= 0.02 * now.seconds


@pytest.mark.parametrize("second", [1.0, 0.8])
def test_all_audits_of_a_run_take_two_percent_though_other_work_slows_the_machine(
    monkeypatch, second
):
    """All takes 5 times as long in every other 1700 steps; every second audit may take less."""
    now = SimpleNamespace(seconds=0.0, slowness=1.0)
    monkeypatch.setattr(watching, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    watch = AuditDuringTraining(RIVALS[:1], repetitions=3)
    module = DiffusionModule(ResidualMLP())
    trainer = SimpleNamespace(global_step=0)
    audits = []

    def audit(trainer, module, batch):
        """Prepare for as long as 30 steps, then measure for as long as 60."""
        begins = watch._comparison is None
        watch._comparison = object() if begins else None
        steps = (30 if begins else 60) * (second if len(audits) % 4 > 1 else 1)
        now.seconds += steps * now.slowness
        audits.append(steps)

    monkeypatch.setattr(watch, "_audit", audit)
    for step in range(60_000):
        trainer.global_step = step
        now.slowness = 5.0 if step // 1700 % 2 else 1.0
        watch.on_train_batch_start(trainer, module, None, step)
        now.seconds += now.slowness
        assert sum(audits) <= 0.02 * step or watch._comparison is not None
    assert sum(audits) >= 0.015 * step


def test_a_run_that_is_too_short_for_one_says_so(caplog):
    with caplog.at_level("INFO"):
        trained(AuditDuringTraining(RIVALS), steps=12)
    assert any("Pass `every_n_steps`" in each for each in caplog.messages)


def test_a_run_that_ends_within_its_first_audit_says_so(caplog):
    with caplog.at_level("INFO"):
        trained(AuditDuringTraining(RIVALS, every_n_steps=2, repetitions=3), steps=4)
    assert "measured nothing: one audit takes 6 whole batches, and the run" in caplog.text


def test_what_cannot_be_audited_is_refused():
    with pytest.raises(ValueError, match="`repetitions` must be at least 3, got 2"):
        AuditDuringTraining(repetitions=2)
    with pytest.raises(ValueError, match="`every_n_steps` must be at least 1, got 0"):
        AuditDuringTraining(every_n_steps=0)
    with pytest.raises(ValueError, match="fills no slot"):
        AuditDuringTraining([Candidate("empty")])
    with pytest.raises(MisconfigurationException, match="must be a DiffusionModule, Score"):
        AuditDuringTraining().setup(None, LightningModule(), "fit")
