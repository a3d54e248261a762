"""GradientSignal in a run: what it leaves alone, what it writes, and what it refuses."""

import csv
import functools

import pytest
import torch
from foreign_trainers import DDPM, Classifier, ddpm_loss, labelled, pictures
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from support.trainers import quiet_trainer

from lightning_vr import STF, VP, DiffusionModule, GradientSignal, ResidualMLP
from lightning_vr.callbacks import gradient_signal_report as report
from lightning_vr.data import EightGaussians
from lightning_vr.variance.signal_statistics import SignalStatistics


def diffusion():
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    return DiffusionModule(ResidualMLP(width=16, depth=1), target=STF(8), optimizer=optimizer)


def gaussians(batch_size=16):
    return EightGaussians(batch_size=batch_size, num_samples=64, num_validation=16)


def each(**settings):
    return GradientSignal(every_n_steps=1, noise_levels=2, **settings)


def fit(make, data, folder, *callbacks, **options):
    """Train; return all that the run leaves, as numbers that compare bitwise."""
    module = make()
    torch.manual_seed(1)
    logger = CSVLogger(folder, name="", version="")
    path = options.pop("ckpt_path", None)
    trainer = quiet_trainer(*callbacks, logger=logger, log_every_n_steps=1, **options)
    trainer.fit(module, data(), ckpt_path=path, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    left = [p.tolist() for p in module.state_dict().values()]
    return left, torch.get_rng_state().tolist(), [m.training for m in module.modules()]


def ddpm():
    torch.manual_seed(0)
    return DDPM()


def ddpm_given():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=100)
    return each(loss=ddpm_loss, schedule=scheduler, clean=lambda batch: batch["image"])


def test_a_run_and_its_resumption_are_bitwise_those_without_the_callback(tmp_path, no_pictures):
    found, callbacks = [], []
    for name, watch in (("without", list), ("with", lambda: [each()])):
        callbacks = [*watch(), *watch()]
        one, two = callbacks[:1], callbacks[1:]
        first = fit(diffusion, gaussians, tmp_path / name / "a", *one, max_epochs=1)
        end = str(tmp_path / name / "a" / "end.ckpt")
        folder = tmp_path / name / "b"
        second = fit(diffusion, gaussians, folder, *two, max_epochs=2, ckpt_path=end)
        found.append((first, second))
    assert found[0] == found[1]

    once = each()
    fit(diffusion, gaussians, tmp_path / "once", once, max_epochs=2)
    assert once.statistics.count == pytest.approx(8, rel=1e-2)
    for name, tensor in once.state_dict()["statistics"].items():
        assert torch.equal(tensor, callbacks[1].state_dict()["statistics"][name])


def test_another_module_with_its_loss_is_measured_and_trains_as_before(tmp_path, no_pictures):
    callback = ddpm_given()
    watched = fit(ddpm, pictures, tmp_path / "with", callback, max_epochs=1)
    assert watched == fit(ddpm, pictures, tmp_path / "without", max_epochs=1)
    assert bool((callback.statistics.variances[0] > 0).all())


@pytest.mark.pictures
def test_a_run_leaves_a_file_a_map_and_tables(tmp_path, capsys):
    callback = each()
    fit(diffusion, gaussians, tmp_path, callback, max_epochs=2)
    with (tmp_path / "gradient_signal.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["step"] == "7"]
    kinds = ["whole", "pair", "pair", "noise level", "pair", "noise level"]
    assert [row["of"] for row in rows] == kinds
    products, variances = callback.statistics.products[0], callback.statistics.variances[0]
    assert float(rows[1]["product"]) == float(products[0, 1])
    assert float(rows[3]["variance"]) == float(variances[1])
    assert rows[1]["variance"] == "nan"
    assert "gradient_signal/squared_mean" in (tmp_path / "metrics.csv").read_text()
    with Image.open(tmp_path / "gradient_signal.png") as picture:
        assert min(picture.size) > 300
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("Gradient signal", "noise scale", "known to pull against each other (8 meas"):
        assert text in printed


def told(cosine):
    """Statistics of two bins of nearly known mean gradients."""
    statistics = SignalStatistics(torch.tensor([0.1, 2.0]), "noise level")
    products = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, cosine], [0.5, cosine, 1.0]])
    for i in range(60):
        statistics.add(products * (1 + 0.01 * (i % 2)), torch.tensor([100.0, 50.0, 50.0]))
    return statistics


def test_a_conflict_and_a_batch_size_are_told_in_a_sentence():
    text = report.conflict_sentence(told(-0.4))
    assert text.startswith("At noise level 0.1 the gradient pulls against that at 2: cosine -0.40")
    assert "known to pull" in report.conflict_sentence(told(0.4))
    text = report.batch_sentence(told(0.4), 25)
    assert "Noise dominates" in text
    assert "a step has 25" in text
    assert "Larger batches save few steps" in report.batch_sentence(told(0.4), 1000)


def test_only_trained_parameters_count(tmp_path, no_pictures):
    def frozen():
        module = diffusion()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.endswith("project_out.bias"))
        return module

    callback = each()
    fit(frozen, gaussians, tmp_path, callback, max_epochs=1)
    assert callback.state_dict()["trainable"] == ["network.project_out.bias"]
    assert not callback.statistics.is_empty


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="GradientSignal needs the loss of a Class"):
        fit(Classifier, labelled, tmp_path, each(), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="GradientSignal needs the `schedule`"):
        fit(ddpm, pictures, tmp_path, each(loss=ddpm_loss), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="needs the `loss` that `draw`"):
        fit(diffusion, gaussians, tmp_path, each(draw=torch.rand), max_epochs=1)
    single = functools.partial(gaussians, batch_size=1)
    with pytest.raises(MisconfigurationException, match="two samples in a batch"):
        fit(diffusion, single, tmp_path, each(), max_epochs=1)
    for settings in ({"every_n_steps": 0}, {"noise_levels": 0}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"`{name}` must be at least"):
            GradientSignal(**settings)
    assert each().state_key != each(loss=ddpm_loss, schedule=VP()).state_key


def test_before_anything_is_measured_a_warning_says_so(tmp_path):
    with pytest.warns(UserWarning, match="GradientSignal has measured nothing"):
        fit(diffusion, gaussians, tmp_path, GradientSignal(), max_steps=2)
    assert not (tmp_path / "gradient_signal.csv").exists()
