"""What an evaluation must have enough of: generated and real samples, and held-out ones."""

from collections.abc import Collection

from lightning_vr.callbacks.real_samples import check_enough, check_training_set
from lightning_vr.callbacks.sample_measures import NEIGHBOURS
from lightning_vr.core.validation import check_integer
from lightning_vr.metrics import Features


def check_counts(
    features: Features,
    measures: Collection[str] | None,
    samples: int,
    real_samples: int | None,
    subset_size: int,
) -> None:
    """Raise if too few samples are asked for.

    Args:
        features: Where to compare.
        measures: What is measured; all if None.
        samples: Number of generated samples.
        real_samples: Number of training samples, or None for all.
        subset_size: Samples in a subset of the kernel distance.

    Raises:
        ValueError: With the numbers.
    """
    if measures is None or "frechet_distance" in measures:
        check_enough(features, samples=samples, real_samples=real_samples)
    least = min(n for n in (samples, real_samples) if n is not None)
    if (measures is None or "kid" in measures) and subset_size > least:
        raise ValueError(
            f"`subset_size` must be at most {least}, the number of samples, got {subset_size}: use "
            f"smaller subsets, or more `samples`."
        )
    for name, count in (("samples", samples), ("real_samples", real_samples)):
        if count is not None:
            check_integer(name, count, NEIGHBOURS + 1)


def check_data(count: int, features: Features, names: Collection[str], subset_size: int) -> None:
    """Raise if a training set of ``count`` samples is too small for the measures of these names.

    Raises:
        ValueError: With the numbers.
    """
    if "frechet_distance" in names:
        check_training_set(count, features, "Evaluation")
    least = max(subset_size if "kid" in names else 1, NEIGHBOURS + 1)
    if count < least:
        raise ValueError(
            f"The training set must have at least {least} samples for `Evaluation`, got {count}: "
            f"use more data, a smaller `subset_size`, or fewer `measures`."
        )
