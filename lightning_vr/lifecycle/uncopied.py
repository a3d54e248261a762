"""Functions that copies of a module have in common."""

from collections.abc import Callable
from typing import Any


class Uncopied:
    """A function that copies of a module have in common, as ``WeightAveraging`` makes one.

    The command line's functions hold on to the whole trainer, which under DDP cannot be copied.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, argument: Any) -> Any:
        return self.function(argument)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Uncopied":
        return self
