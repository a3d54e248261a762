"""Checks of the arguments of STF, when it is built."""

import math

from lightning_vr.core.validation import check_at_least, check_choice


def check_references(
    references: int | str, min_noise_level: float | str, chunk_size: int | None, sharded: bool
) -> None:
    """Raise if an argument of STF is not of its kind, or does not fit the others.

    Raises:
        ValueError: With what is allowed.
    """
    if isinstance(references, str):
        is_valid = references in ("batch", "all")
    else:
        is_valid = isinstance(references, int) and references >= 1
    if not is_valid:
        raise ValueError(
            f"`references` must be 'batch', 'all' or a number of 1 or more, got {references!r}: "
            f"use 'batch' if in doubt."
        )
    if min_noise_level != "auto" and not (
        isinstance(min_noise_level, (int, float)) and 0 <= min_noise_level < math.inf
    ):
        raise ValueError(
            f"`min_noise_level` must be 'auto' or a finite number of 0 or more, got "
            f"{min_noise_level!r}: use 0.0 for references at all noise levels."
        )
    if chunk_size is not None:
        check_at_least("chunk_size", chunk_size, 1)
    if sharded and references == "batch":
        raise ValueError(
            "`sharded` must be False with references='batch', which keeps no bank, got True: use "
            "'all' or a number of references, or leave it out."
        )


def check_storage(references: int | str, dtype: str, storage: str) -> None:
    """Raise if a bank cannot be kept like this.

    Raises:
        ValueError: With what is allowed.
    """
    check_choice("dtype", dtype, ("float32", "bfloat16", "uint8"))
    check_choice("storage", storage, ("memory", "data"))
    if references == "batch" and (dtype, storage) != ("float32", "memory"):
        raise ValueError(
            f"`dtype` and `storage` must be left out with references='batch', which keeps no bank, "
            f"got {dtype!r} and {storage!r}: use 'all' or a number of references."
        )
    if storage == "data" and dtype != "float32":
        raise ValueError(
            f"`dtype` must be left out with storage='data', as the data have one, got {dtype!r}: "
            f"write the data in another dtype, or use storage='memory'."
        )


def check_bank(references: int | str, size: int, indexed: bool) -> None:
    """Raise if a bank of this size, with or without indices, cannot give the references.

    Raises:
        ValueError: With what is allowed.
    """
    if references == "all" and not indexed:
        raise ValueError(
            "`references='all'` needs sample indices, got none: let the data set return "
            "`index` and `encode` pass it on, or use a number of references. Without indices "
            "the own sample would count twice, once as its copy in the bank, which is a bias."
        )
    if references != "all" and int(references) > size:
        raise ValueError(
            f"`references` must be at most {size}, the size of the training set, got "
            f"{references}: use fewer, or 'all'."
        )
