"""In from and out to diffusers: folders, schedulers, model cards.

It imports ``training`` and what is below; diffusers only where a function needs it.
"""

from lightning_vr.pipelines.export_folder import ExportFormat, export
from lightning_vr.pipelines.outgoing_pipeline import to_pipeline
from lightning_vr.pipelines.provenance import Provenance
from lightning_vr.training.hand_over import set_to_pipeline

__all__ = ["ExportFormat", "Provenance", "export", "to_pipeline"]

set_to_pipeline(to_pipeline)
