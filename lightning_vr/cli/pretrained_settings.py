"""Settings of a module whose network is that of a folder of diffusers."""

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_warn

from lightning_vr.lifecycle.configuration import imported
from lightning_vr.training.incoming_folder import IncomingFolder
from lightning_vr.training.module import DiffusionModule


def check_pretrained(settings: Namespace, folder: IncomingFolder) -> None:
    """Warn of settings that the weights of a folder were not trained with.

    Args:
        settings: The settings of a command, with ``pretrained``.
        folder: What the folder says.

    Raises:
        ValueError: If the module has no network to begin with.
    """
    kind = imported(settings.model.class_path)
    if isinstance(kind, type) and not issubclass(kind, DiffusionModule):
        raise ValueError(
            f"`pretrained` must be left out for a {kind.__name__}, which begins with no network: "
            f"name the folder in its `teacher`, by FrozenTeacher.from_pretrained."
        )
    configured = settings.model.as_dict()["init_args"]
    for name, saved in folder.others.items():
        if configured.get(name) not in (saved, "auto"):
            rank_zero_warn(
                f"Setting `model.{name}` is {configured.get(name)}, but {saved} in "
                f"{settings.pretrained}, whose weights were trained with it: leave it out, unless "
                f"you mean this."
            )
