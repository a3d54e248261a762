"""In from and out to diffusers: folders, schedulers, model cards.

It imports ``training`` and what is below; diffusers only where a function needs it.
"""

from lightning_vr.pipelines.export import ExportFormat, export
from lightning_vr.pipelines.incoming_folder import IncomingFolder
from lightning_vr.pipelines.provenance import Provenance
from lightning_vr.pipelines.to_pipeline import to_pipeline

__all__ = ["ExportFormat", "IncomingFolder", "Provenance", "export", "to_pipeline"]
