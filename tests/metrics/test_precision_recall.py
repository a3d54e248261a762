"""Precision and recall against a second formula, and where the answer is known."""

import pytest
import torch

from lightning_vr.metrics import neighbours, precision_recall


def points(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covered(queries, support, k):
    """The fraction of points within the ball of some point of the support, one by one."""
    inside = 0
    for query in queries.tolist():
        for centre in support.tolist():
            others = sorted(torch.dist(torch.tensor(centre), other) for other in support)
            inside += float(torch.dist(torch.tensor(query), torch.tensor(centre))) <= others[k]
            if float(torch.dist(torch.tensor(query), torch.tensor(centre))) <= others[k]:
                break
    return inside / len(queries)


@pytest.mark.parametrize("k", [1, 3])
def test_they_are_what_one_point_after_the_other_gives(k, monkeypatch):
    monkeypatch.setattr(neighbours, "_ENTRIES", 70)  # a few rows at a time
    real, generated = points(25, 2), points(25, 2, seed=1) * 1.5 + 0.5
    precision, recall = precision_recall(real, generated, k)
    assert precision == covered(generated, real, k)
    assert recall == covered(real, generated, k)
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_equal_sets_have_both_disjoint_sets_neither():
    real = points(50, 3)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)


def test_a_dropped_mode_lowers_recall_alone_and_a_false_one_precision_alone():
    left, right = points(100, 2) - 50, points(100, 2, seed=1) + 50
    both = torch.cat([left[:50], right[:50]])
    precision, recall = precision_recall(both, left[:100])
    assert precision > 0.8
    assert recall == pytest.approx(0.5)
    assert precision_recall(left, both)[0] == pytest.approx(0.5)


def test_sets_of_other_sizes_or_without_neighbours_are_refused():
    with pytest.raises(ValueError, match="equally many samples, got 5 and 6"):
        precision_recall(points(5, 2), points(6, 2))
    with pytest.raises(ValueError, match=r"`neighbours` must be less than 3, .* got 3"):
        precision_recall(points(3, 2), points(3, 2))
