"""A file imports only from lower layers (DESIGN, section 3); within a layer there are no cycles."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_vr

PACKAGE = Path(lightning_vr.__file__).parent
TENSOR_LAYERS = [
    ["types", "rng", "distributed", "networks", "batches", "timing", "compilation", "whole_files"],
    [
        "timesteps",
        "schedules",
        "diffusers_schedule",
        "predictions",
        "weightings",
        "objective",
        "proposals",
        "references",
        "sharded",
        "softmax_sums",
        "posterior",
    ],
    ["estimators", "variance"],
]
LAYERS = [
    *TENSOR_LAYERS,
    [
        "sampling",
        "metrics",
        "module",
        "noisy_losses",
        "configuration",
        "checkpoints",
        "precision",
        "nonfinite",
        "averages",
        "resuming",
        "stopping",
        "batch_counts",
        "checkpoint_io",
        "csv_logs",
        "resampling",
        "training_set",
        "sinks",
        "fitting",
        "control_measurement",
        "bank",
        "checks",
        "training_checks",
    ],
    ["callbacks", "data"],
    ["auditing"],
    ["cli", "__main__", "__init__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# run by hand to make the weights that ship: it stands above all, and nothing may import it
SCRIPTS = {"lightning_vr.metrics.digit_classifier"}
LOGGERS = {"wandb", "tensorboard", "mlflow", "comet_ml", "neptune", "matplotlib"}
FORBIDDEN = LOGGERS | {"lightning", "pytorch_lightning", "diffusers", "torchmetrics", "sklearn"}


def room(path):
    """The file's or folder's name directly under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def dotted(path):
    """The module's dotted name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def level(name):
    return len(LAYERS) if name in SCRIPTS else LEVEL[(name + ".__init__").split(".")[1]]


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path):
    """Every module that a file imports, also inside functions, but not for type checkers alone."""
    nodes, found = [ast.parse(path.read_text())], []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from package import module` names a module, `from module import name` does not
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [name for name in names if name in MODULES]
            found += known or [node.module]
        if not is_type_checking(node):
            nodes += ast.iter_child_nodes(node)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {dotted(path) for path in FILES}
every_file = pytest.mark.parametrize("path", FILES, ids=dotted)


@every_file
def test_every_file_has_a_layer(path):
    assert room(path) in LEVEL


@every_file
def test_a_file_imports_only_from_its_own_and_lower_layers(path):
    for name in MODULES.intersection(imports(path)):
        if name == "lightning_vr":
            assert room(path) == "__main__", f"{path.name} imports the package's root"
        else:
            assert level(name) <= level(dotted(path)), f"{path.name} imports {name}"


def test_imports_have_no_cycle():
    graph = {dotted(path): MODULES.intersection(imports(path)) for path in FILES}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("lightning_vr.types") < order.index("lightning_vr.module")


@pytest.mark.parametrize(
    "path", [p for p in FILES if LEVEL.get(room(p), 99) < len(TENSOR_LAYERS)], ids=dotted
)
def test_tensor_layers_import_no_lightning_logger_or_diffusers(path):
    assert not FORBIDDEN.intersection(name.split(".")[0] for name in imports(path))


def test_importing_the_package_pulls_in_no_heavy_library_that_lightning_does_not():
    heavy = {"diffusers", "wandb", "matplotlib", "sklearn", "datasets", "torch_fidelity"}
    code = (
        "import sys, lightning.pytorch; before = set(sys.modules); import lightning_vr;"
        f"print({heavy} & (set(sys.modules) - before))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert found.stdout.strip() == "set()"
