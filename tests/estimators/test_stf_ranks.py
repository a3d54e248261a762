import pytest
import torch

from lightning_vr.core.rng import generator
from lightning_vr.core.types import Clean
from lightning_vr.estimators.draws import noise_samples
from lightning_vr.estimators.stf import STF
from lightning_vr.process.schedules import EDM

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")

SHARES = [slice(0, 3), slice(3, 8)]


def batch(resamples=1, labels=True):
    """A batch of eight samples, each drawn ``resamples`` times."""
    source = generator("whole batch")
    x0 = torch.randn(8, 3, generator=source, dtype=torch.float64)
    group = torch.arange(8) % 2 if labels else None
    repeated = Clean(
        x0.repeat_interleave(resamples, 0),
        None if group is None else group.repeat_interleave(resamples),
    )
    t = torch.linspace(0.3, 3.0, 8 * resamples, dtype=torch.float64)
    return Clean(x0, group), repeated, t


def share(rows, resamples, labels, noise):
    """One rank's part of the batch, with its part of the whole batch's noise."""
    clean, repeated, t = batch(resamples, labels)
    draws = slice(rows.start * resamples, rows.stop * resamples)

    def part(x, rows):
        return None if x is None else x[rows]

    mine = Clean(part(clean.x0, rows), part(clean.group, rows))
    given = Clean(part(repeated.x0, draws), part(repeated.group, draws))
    noised = noise_samples(given, EDM(), t[draws], torch.ones_like(t[draws]), generator(0))
    noise = noise[draws]
    xt = noised.x0 + noised.sigma[:, None] * noise
    return mine, type(noised)(**{**vars(noised), "xt": xt, "noise": noise})


def target_of(rows, resamples, labels, min_noise_level=0.0):
    noise = torch.randn(16, 3, generator=generator("noise"), dtype=torch.float64)
    clean, noised = share(rows, resamples, labels, noise)
    found = STF("batch", min_noise_level)(noised, clean, generator(0))
    return {name: getattr(found, name) for name in ("x0", "ess", "spread")}


CASES = [(1, False, 0.0), (1, True, 0.0), (2, True, 0.0), (1, True, 2.0)]


@pytest.fixture(scope="module")
def results(on_two_ranks):
    return on_two_ranks(lambda rank: [target_of(SHARES[rank], *case) for case in CASES])


@pytest.mark.parametrize("case", range(len(CASES)), ids=["plain", "labels", "draws", "switch"])
def test_two_ranks_give_the_target_of_one_process_on_the_whole_batch(results, case):
    """With the switch at 2 the first rank has no row above it, and must gather all the same."""
    whole = target_of(slice(0, 8), *CASES[case])
    for name in ("x0", "ess", "spread"):
        parts = torch.cat([found[case][name] for found in results])
        torch.testing.assert_close(parts, whole[name], rtol=1e-10, atol=1e-12)
    assert float(whole["ess"].max()) > 1.5
