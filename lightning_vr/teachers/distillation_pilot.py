"""How many draws of each view pay: the pilot of ``CARV(resamples="auto")`` of a distillation.

It is the pilot of training (``training.resamples_pilot``) on gradients by the scene. A view costs
``render`` and ``encode``, forward and backward, and a draw a pass of the teacher. Antipodal pairs
of views stay together, so that what they save counts as less variance between views.
"""

from typing import Any

from lightning_vr.core.types import Clean
from lightning_vr.training.resamples_pilot import ResamplesPilot


class DistillationPilot(ResamplesPilot):
    """Chooses K while a scene trains, and logs what it has measured.

    Loggers get seconds of a view's ``render`` and ``encode`` and of a draw as ``pilot/render_s``,
    ``pilot/encode_s`` and ``pilot/denoise_s``; the variance between views and within one as
    ``pilot/between_views`` and ``pilot/within_views``; and K as ``pilot/resamples``.
    """

    def before_step(self, batch: Any) -> None:
        """Choose anew if it is time; all ranks must call it before each optimizer step."""
        before = self.draws.pilot
        super().before_step(batch)
        found = self.draws.pilot
        if found is None or found is before:
            return
        names = {"between": "between_views", "within": "within_views"}
        variances = {f"pilot/{names[x]}": found[x] for x in names if x in found}
        numbers = {"pilot/resamples": float(self.draws.chosen), **self._costs, **variances}
        self.run.log(numbers, {})

    def _seconds(self, batch: Any, clean: Clean) -> tuple[float, float]:
        upstream, denoise = super()._seconds(batch, clean)
        model: Any = self.model
        (render,) = self._medians(lambda: self._backward([model.rendered(batch).x0]))
        render /= len(clean.x0)
        costs = {"render": render, "encode": max(0.0, upstream - render), "denoise": denoise}
        self._costs = {f"pilot/{name}_s": value for name, value in costs.items()}
        return upstream, denoise

    @property
    def _rows(self) -> int:
        views = getattr(self.model, "views", None)
        return 1 if views is None else int(views.rows)
