"""ConvergenceMonitor in a plain loop: what it leaves alone, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from support.comparisons import assert_equal
from support.networks import small_unet

from lightning_vr import VP, Clean, ConvergenceMonitor

IMAGES = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(3))
SCHEDULER = DDPMScheduler(num_train_timesteps=100)


def loss(model, x0, noise, t):
    t = t.long()
    predicted = model(SCHEDULER.add_noise(x0, noise, t), t).sample
    return (predicted - noise).square().flatten(1).mean(dim=1)


def monitor(images=IMAGES, **settings):
    options = {"schedule": SCHEDULER, "every_n_steps": 2, "noise_levels": 3, "samples": 16}
    return ConvergenceMonitor(images[:16], images[16:], loss=loss, **(options | settings))


def train(steps=4, watch=None):
    """The loop of diffusers' training scripts; a monitor is one line of it."""
    torch.manual_seed(0)
    model = small_unet(dropout=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        if watch is not None:
            watch.update(step, model)
        clean = IMAGES[torch.randint(16, (4,))]
        noise = torch.randn_like(clean)
        t = torch.randint(0, 100, (4,))
        predicted = model(SCHEDULER.add_noise(clean, noise, t), t).sample
        F.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_loop_is_bitwise_the_same_with_and_without_it():
    watch = monitor()
    plain, watched = train(), train(watch=watch)
    assert_equal(dict(watched.state_dict()), dict(plain.state_dict()))
    assert all(part.training for part in watched.modules())
    assert [record.step for record in watch.records] == [0, 2]
    assert watch.summary().startswith("At step 2 the training loss is")


def test_what_is_measured_is_the_mean_of_the_loss_at_its_draws():
    """The training loss is averaged over x0 given x_t: the mean is that of the loss itself."""
    model = small_unet()
    watch = monitor(0.05 * IMAGES, samples=512, noise_levels=2, batch_size=512)
    record = watch.measure(0, model)

    def plain(draws):
        batches = draws.batches(512, torch.device("cpu"))
        with torch.no_grad():
            found = [loss(model, n.x0, n.noise, n.t).double() for _, n in batches]
        return torch.stack(found).reshape(2, -1, 16).mean(dim=1)

    torch.testing.assert_close(record.held_out, plain(watch._held_out), rtol=1e-4, atol=1e-6)
    difference = plain(watch._train) - (record.direct + watch.floors.low)
    error = difference.std(dim=1) / 4
    assert (difference.mean(dim=1).abs() < 4 * error + 1e-6).all()
    assert float(error.max()) > 1e-4


def test_a_loss_sees_the_condition_of_each_sample_where_it_takes_the_clean_samples():
    """Conditions that nobody shares, whose samples are known: the loss is 0, without a floor."""
    seen = []

    def known(model, x0, noise, t, clean):
        seen.append(clean.cond["scale"].shape)
        return (x0 - clean.cond["scale"] * clean.cond["answer"]).square().flatten(1).sum(1)

    given = Clean(IMAGES, cond={"answer": IMAGES / 2, "scale": torch.full((1, 1, 1, 1), 2.0)})
    settings = {"schedule": SCHEDULER, "noise_levels": 2, "samples": 16, "loss": known}
    watch = ConvergenceMonitor(given.rows(slice(16)), **settings)
    record = watch.measure(0, small_unet())
    assert seen == [(16, 1, 1, 1)] * len(seen)
    torch.testing.assert_close(record.direct, torch.zeros_like(record.direct))
    assert watch.floors.middle.isnan().all()


def test_it_goes_on_from_its_state(tmp_path):
    whole = monitor()
    train(watch=whole)
    first, second = monitor(), monitor()
    first.records = whole.records[:1]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(watch=second)
    assert [record.step for record in second.records] == [0, 2]
    assert torch.equal(second.records[1].direct, whole.records[1].direct)
    assert second.summary() == whole.summary()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1"),
        ({"noise_levels": 1}, "`noise_levels` must be at least 2"),
        ({"samples": 8}, "`samples` must be at least 16"),
        ({"max_data": 1}, "`max_data` must be at least 2"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        monitor(**settings)


def test_samples_that_are_not_finite_are_refused():
    bad = IMAGES.clone()
    bad[3] = float("nan")
    with pytest.raises(ValueError, match="`train` must be finite"):
        ConvergenceMonitor(bad, loss=loss, schedule=SCHEDULER)


def test_a_loss_that_is_one_number_is_refused():
    watch = ConvergenceMonitor(torch.randn(20, 2), loss=lambda *_: torch.zeros(()), schedule=VP())
    with pytest.raises(ValueError, match="`loss` must return one number for each of the"):
        watch.update(0, torch.nn.Linear(2, 2))
