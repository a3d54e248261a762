"""Precision and recall of generated samples in a space of features.

Each set is taken to cover the balls around its points that reach to their k-th nearest neighbour
within the set. Precision is the fraction of generated samples within the real set's balls, and says
whether samples look real. Recall is the fraction of real samples within the generated set's balls,
and says whether all that is real is generated (Kynkäänniemi et al. 2019, arXiv 1904.06991, equation
2, with k = 3).

Both depend on the numbers of points: the more a set has, the smaller are its balls. The two sets
are therefore of equal size, and only values of equal sizes and k can be compared.
"""

from torch import Tensor

from lightning_vr.core.validation import check_integer
from lightning_vr.metrics.neighbours import distance_rows, nearest_distances


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Return the precision and the recall of generated samples.

    Args:
        real: Features of real samples ``(n, f)``.
        generated: Features of generated samples ``(n, f)``.
        neighbours: Which neighbour a ball reaches to, k.

    Raises:
        ValueError: If the sets differ in size, or have no k-th neighbours.
    """
    check_integer("neighbours", neighbours, 1)
    if len(real) != len(generated):
        raise ValueError(
            f"`real` and `generated` must have equally many samples, got {len(real)} and "
            f"{len(generated)}: leave some out, as precision and recall depend on the numbers."
        )
    if len(real) <= neighbours:
        raise ValueError(
            f"`neighbours` must be less than {len(real)}, the number of samples, got "
            f"{neighbours}: use more samples."
        )
    return (
        _covered(generated, real, neighbours),
        _covered(real, generated, neighbours),
    )


def _covered(points: Tensor, support: Tensor, neighbours: int) -> float:
    """Return the fraction of points within a ball of the support."""
    radii = nearest_distances(support, support, neighbours + 1)  # the first is the point itself
    inside = sum(int((rows <= radii).any(dim=1).sum()) for rows in distance_rows(points, support))
    return inside / len(points)
