"""Every scheduler class of diffusers, and what some of them must be given."""

import importlib
import inspect
import pkgutil

import diffusers.schedulers


def scheduler_classes():
    """All classes of diffusers' schedulers that can be imported here, by name."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
        try:
            names = vars(importlib.import_module(module.name))
        except ImportError:  # of a package that is not installed
            continue
        kinds = [x for x in names.values() if inspect.isclass(x) and x.__module__ == module.name]
        found |= {x.__name__: x for x in kinds if issubclass(x, diffusers.SchedulerMixin)}
    found.pop("SchedulerMixin")
    return found


CLASSES = scheduler_classes()
REQUIRED = {
    "AmusedScheduler": {"mask_token_id": 0},
    "RFD4ProteinaScheduler": {
        "schedule_mode": "log",
        "noise_mode": "tan",
        "tsr_k": 1.0,
        "tsr_sigma": 1.0,
    },
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}
