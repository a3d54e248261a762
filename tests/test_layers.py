"""The rooms of the package and what they may import (a floor imports from lower floors alone)."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import lightning_vr

PACKAGE = Path(lightning_vr.__file__).parent
FLOORS = [
    {"core"},
    {"process"},
    {"posterior", "data", "metrics"},
    {"estimators"},
    {"variance", "lifecycle"},
    {"training"},
    {"teachers", "callbacks", "pipelines"},
    {"auditing"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TENSOR_ROOMS = ("core", "process", "posterior", "estimators", "variance", "training/diffusion.py")
FRAMEWORKS = {"lightning", "pytorch_lightning", "diffusers", "torchmetrics", "sklearn"}
LOGGERS = {"wandb", "tensorboard", "mlflow", "comet_ml", "neptune", "matplotlib"}
MAY_IMPORT_DIFFUSERS = tuple(
    f"process/diffusers_{name}.py" for name in ("autoencoder", "network", "schedule", "solver")
)

FILES = sorted(PACKAGE.rglob("*.py"))


def dotted(path):
    """The dotted name of a file's module."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {dotted(path) for path in FILES}


def room(module):
    """The room of a module of the package, "" for what stands at the top."""
    return (module + "..").split(".")[1]


def imports(path):
    """Every module that a file imports, also inside functions and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from package import module` names a module, `from module import name` does not
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES) or {node.module}
    return found


@functools.cache
def all_imports():
    """By module; as late as this, since to parse all files takes a second."""
    return {dotted(path): imports(path) for path in FILES}


def imports_inside():
    """The same of modules in rooms, and only modules of the package."""
    return {
        module: found & MODULES for module, found in all_imports().items() if room(module) in FLOOR
    }


def test_nothing_stands_loose_at_the_top_of_the_package():
    names = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert names == {"__init__.py", "__main__.py", "py.typed", *FLOOR}


def test_a_file_imports_from_its_own_room_and_lower_floors_alone():
    upward = [
        f"{module} imports {imported}"
        for module, found in imports_inside().items()
        for imported in found
        if room(module) != room(imported)
        and FLOOR[room(module)] <= FLOOR.get(room(imported), len(FLOORS))
    ]
    assert not upward


def test_imports_have_no_circle():
    # raises CycleError, which names it
    order = list(TopologicalSorter(imports_inside()).static_order())
    assert order.index("lightning_vr.core.types") < order.index("lightning_vr.training.module")


def test_rooms_of_tensors_import_no_lightning_diffusers_or_logger():
    wrong = {
        f"{path}: {name}"
        for path, name in (
            (path.relative_to(PACKAGE).as_posix(), name.partition(".")[0])
            for path in FILES
            for name in all_imports()[dotted(path)]
        )
        if path.startswith(TENSOR_ROOMS) and name in FRAMEWORKS | LOGGERS
    }
    assert wrong <= {f"{path}: diffusers" for path in MAY_IMPORT_DIFFUSERS}


def test_rooms_of_tensors_import_no_room_that_imports_lightning():
    lightning_rooms = {"data", "metrics", "lifecycle"}
    wrong = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in FILES
        for name in all_imports()[dotted(path)] & MODULES
        if path.relative_to(PACKAGE).as_posix().startswith(TENSOR_ROOMS)
        and room(name) in lightning_rooms
    }
    assert not wrong


def test_files_are_short():
    lengths = {dotted(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {module: n for module, n in lengths.items() if n > 320}
    assert lengths["lightning_vr.training.module"] <= 240
