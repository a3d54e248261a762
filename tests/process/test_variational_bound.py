"""The bound of exact reverse processes, whose value is known."""

import math

import pytest
import torch
from support.gaussian_reverse import STD, exact, table

from lightning_vr.process.reverse_estimate import ReverseEstimate
from lightning_vr.process.reverse_steps import ReverseSteps
from lightning_vr.process.variational_bound import VariationalBound

BITS = 1 / math.log(2)


def data(source, count=4000):
    return STD * torch.randn(count, 2, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("steps", [20, 5])
def test_with_the_exact_variance_it_is_the_entropy_and_the_divergence_of_the_end(
    steps, source, z_score
):
    """Each step back is normal for normal data, so that nothing else is lost, however few."""
    schedule = table(20)
    found = VariationalBound(steps).bits_per_dimension(
        exact(schedule, steps), schedule, data(source), source
    )
    end = ReverseSteps.of(schedule)
    variance = float((end.alpha[-1] * STD) ** 2 + end.sigma[-1] ** 2)
    lost = 0.5 * (variance - 1 - math.log(variance))
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2)
    assert abs(z_score(found["learned"], (entropy + lost) * BITS)) < 4
    for fixed in ("beta", "beta_tilde"):
        assert z_score(found[fixed] - found["learned"]) > 10


def test_pixels_of_one_value_cost_what_the_bins_leave_out(source):
    """With all pixels at one level and a network that knows, only beta~ and the bins cost bits."""
    schedule, x0 = table(50), torch.full((8, 3), -1.0)

    def estimate(xt, t, group, cond):
        return ReverseEstimate(torch.full_like(xt, -1.5))

    bound = VariationalBound(levels=4, clip_sample=True)
    terms = bound.terms(estimate, schedule, x0, source, variances=["beta_tilde"])["beta_tilde"]
    assert terms.shape == (8, 51)
    assert float(terms[:, :-1].abs().max()) < 1e-6
    unclipped = VariationalBound(levels=4).terms(
        estimate, schedule, x0, source, variances=["beta_tilde"]
    )
    assert float(unclipped["beta_tilde"][:, 1:-1].min()) > 0


def test_labels_and_conditions_reach_the_network(source):
    seen = []

    def estimate(xt, t, group, cond):
        seen.append((group, cond))
        return ReverseEstimate(xt)

    group, cond = torch.tensor([1, 2]), {"text": torch.zeros(2, 3)}
    x0 = torch.zeros(2, 2)
    VariationalBound(3).terms(
        estimate, table(), x0, source, variances=["beta"], group=group, cond=cond
    )
    assert len(seen) == 3
    assert all(labels is group and text is cond for labels, text in seen)


def test_what_cannot_be_bounded_is_refused(source):
    x0, schedule = torch.zeros(2, 2), table()

    def silent(xt, t, group, cond):
        return ReverseEstimate(xt)

    with pytest.raises(ValueError, match="`variance` must be 'beta' or 'beta_tilde'"):
        VariationalBound(2).bits_per_dimension(silent, schedule, x0, source)
    with pytest.raises(ValueError, match="`levels` must be the number of values"):
        VariationalBound(2, levels=256).terms(silent, schedule, x0 + 0.3, source)
    with pytest.raises(ValueError, match="`variances` must be 'learned'"):
        VariationalBound(2).terms(silent, schedule, x0, source, variances=["fixed"])
    with pytest.raises(ValueError, match="`steps` must be at least 2"):
        VariationalBound(1)
