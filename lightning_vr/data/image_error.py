"""Errors of images: one line that names the image, also where a loader's worker has met it."""


class ImageError(ValueError):
    """An image that cannot be used.

    torch builds the error of a loader's worker anew in the training process, with the worker's
    whole traceback as its text. The message is what stands behind the last name of this class.

    Args:
        message: The message, or a traceback that ends with it.
    """

    def __init__(self, message: str) -> None:
        kind = type(self)
        super().__init__(message.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())


class UnsuitableImageError(ValueError):
    """What is wrong with an image that is no broken file; follows its name in a sentence."""


class MissingImageError(UnsuitableImageError):
    """A row of a data set without an image."""

    def __init__(self) -> None:
        super().__init__(
            "is missing: remove rows without an image, as with `datasets.Dataset.filter`."
        )


def missing_image(name: str) -> ImageError:
    """Return the error for a row without an image.

    Args:
        name: Name of the image.
    """
    return unreadable(name, MissingImageError())


def unreadable(name: str, error: Exception) -> ImageError:
    """Return the error for an image that cannot be used.

    Args:
        name: Name of the image.
        error: What opening or decoding it has raised.
    """
    text = " ".join(str(error).split())
    if isinstance(error, UnsuitableImageError):
        return ImageError(f"Image {name} {text}")
    return ImageError(
        f"Image {name} cannot be read ({type(error).__name__}: {text}): repair or remove it."
    )
