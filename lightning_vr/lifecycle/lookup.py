"""What a dotted name stands for, with as little run on the way as can be."""

import importlib
import importlib.util
import sys
from typing import Any


def find_imported(name: str) -> Any:
    """Return what a name stands for in the modules imported so far, or None; nothing is run."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:cut]))
        if found is None:
            continue
        for part in parts[cut:]:
            # past the hooks of modules that import on demand
            found = vars(found).get(part) if hasattr(found, "__dict__") else None
        return found
    return None


def find_importing(name: str) -> Any:
    """Return what a name of a trusted package stands for, importing its module, or None."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if module not in sys.modules:
            # what begins with an underscore may be a program: __main__ is
            if any(part.startswith("_") for part in parts[:cut]):
                continue
            try:
                importlib.import_module(module)
            except Exception:  # whatever an import meets, the name leads nowhere
                continue
        found: Any = sys.modules[module]
        for part in parts[cut:]:
            try:
                found = getattr(found, part, None)
            except Exception:  # of a module that imports on demand what is not installed
                return None
        return found
    return None


def could_be_imported(name: str) -> bool:
    """Return whether a dotted name may lead to a module; nothing is imported."""
    root = name.partition(".")[0]
    if root in sys.modules or root in sys.stdlib_module_names:
        return True
    try:
        # for a name without dots this only looks for files
        return importlib.util.find_spec(root) is not None
    except (ImportError, ValueError):
        return True
