"""In from and out to diffusers: folders, schedulers, model cards.

It imports ``training`` and what is below; diffusers only where a function needs it.
"""

from lightning_vr.pipelines.export_folder import ExportFormat, export
from lightning_vr.pipelines.incoming_folder import IncomingFolder
from lightning_vr.pipelines.outgoing_pipeline import to_pipeline
from lightning_vr.pipelines.provenance import Provenance

__all__ = ["ExportFormat", "IncomingFolder", "Provenance", "export", "to_pipeline"]
