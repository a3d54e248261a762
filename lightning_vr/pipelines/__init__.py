"""In from and out to diffusers: folders, schedulers, model cards.

It imports ``training`` and what is below; diffusers only where a function needs it.
"""

from lightning_vr.pipelines.export_folder import ExportFormat, export
from lightning_vr.pipelines.incoming_folder import IncomingFolder
from lightning_vr.pipelines.outgoing_pipeline import to_pipeline
from lightning_vr.pipelines.provenance import Provenance
from lightning_vr.training.hand_over import set_hand_over

__all__ = ["ExportFormat", "IncomingFolder", "Provenance", "export", "to_pipeline"]

set_hand_over(to_pipeline, lambda folder: IncomingFolder.read(folder).arguments())
