"""Curves of measured target variance over noise levels, for plots, tables and loggers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lightning_vr.core.validation import check_integer, check_saved_tensor


class MeasuredCurve(NamedTuple):
    """A curve over the noise levels.

    Attributes:
        mean: Estimate at each noise level ``(L,)``, float64.
        error: Its standard error ``(L,)``.
    """

    mean: Tensor
    error: Tensor


@dataclass(frozen=True)
class TargetVarianceCurve:
    """Target variance of a data set over noise levels.

    Attributes:
        noise_levels: ``sigma / alpha``, ``(L,)``, float64.
        size: Number of samples N of the data set.
        dsm: V_DSM, in units of the unweighted score at alpha = 1.
        stf: V_STF of each number of references, same unit.
        ess: Effective number of references for each number of them, and for N.
        divergence: D(s), between 0 and about (N - 1)².
    """

    noise_levels: Tensor
    size: int
    dsm: MeasuredCurve
    stf: dict[int, MeasuredCurve]
    ess: dict[int, MeasuredCurve]
    divergence: MeasuredCurve

    def factor(self, references: int) -> Tensor:
        """Return V_DSM / V_STF ``(L,)``: infinite where V_STF alone is 0, NaN where both are."""
        return self.dsm.mean / self.stf[references].mean

    def in_x0_space(self, variance: MeasuredCurve) -> MeasuredCurve:
        """Return a variance in x0 units squared."""
        unit = self.noise_levels**4
        return MeasuredCurve(variance.mean * unit, variance.error * unit)

    def columns(self) -> dict[str, Tensor]:
        """Return every number by name: ``dsm, dsm_error, stf_16, stf_16_error, ..., ess_all``."""
        curves = {"dsm": self.dsm}
        curves |= {f"stf_{self.name(n)}": curve for n, curve in self.stf.items()}
        curves |= {f"ess_{self.name(n)}": curve for n, curve in self.ess.items()}
        curves["divergence"] = self.divergence
        return {
            name + suffix: values
            for name, curve in curves.items()
            for suffix, values in (("", curve.mean), ("_error", curve.error))
        }

    def name(self, references: int) -> str:
        """Return how columns name a number of references: ``"all"`` for the whole data set."""
        return "all" if references == self.size else str(references)

    def state(self) -> dict[str, Any]:
        """Return tensors, numbers and dictionaries, as a checkpoint keeps them."""
        return {
            "noise_levels": self.noise_levels,
            "size": self.size,
            "dsm": tuple(self.dsm),
            "stf": {n: tuple(curve) for n, curve in self.stf.items()},
            "ess": {n: tuple(curve) for n, curve in self.ess.items()},
            "divergence": tuple(self.divergence),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "TargetVarianceCurve":
        """Rebuild a curve from its ``state``.

        Raises:
            ValueError: If it is none.
        """
        check_integer("size", state["size"], 1)
        levels, found = state["noise_levels"], {}
        check_saved_tensor("noise_levels", levels, (len(levels),))
        for name in ("stf", "ess"):
            found[name] = {n: _curve(name, x, len(levels)) for n, x in state[name].items()}
        if not found["ess"].keys() >= found["stf"].keys():
            raise ValueError(
                f"`ess` of a saved state must have all numbers of references, got "
                f"{list(found['ess'])}: the file is damaged, use another checkpoint."
            )
        dsm, divergence = (_curve(name, state[name], len(levels)) for name in ("dsm", "divergence"))
        return cls(levels, state["size"], dsm, found["stf"], found["ess"], divergence)


def _curve(name: str, state: Any, levels: int) -> MeasuredCurve:
    """Rebuild a curve of so many noise levels from its mean and error."""
    curve = MeasuredCurve(*state)
    for part in curve:
        check_saved_tensor(name, part, (levels,))
    return curve
