"""Numbers of the pages that are exact, compared with what this tree gives.

Exact are numbers that no random draw and no clock is in: closed forms, quadratures, counts. Each is
read from the page itself, and looked for in what a command of the page prints or computed from the
code.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import diffusers
import torch
import yaml
from study import Study, markdown
from taylor_mnist import unet
from torch import nn

from lightning_vr import VP, LogNormal, ResidualMLP
from lightning_vr.data import digits
from lightning_vr.metrics import DigitFeatures

EXAMPLES = Path(__file__).parents[1]

BUDGET = "error_budget/error_budget.py"
BUDGETS = f"{BUDGET} orders narrow grids split --width 0.03 --quantiles 8192"
TABLES = ("scale/scale_on_paper.py", "scale/scale_on_paper.py --check")
"""Each line that these print stands on their page."""

_NUMBER = r"([\d.,e+-]+)"
_FIVE = r"^\| " + r" \| ".join([_NUMBER] * 5)
_EULER, _HEUN = rf"{_FIVE} \| (\S*) *\| (\S*) *\|$", rf"{_FIVE} \| (\S*) *\|$"
_K = rf"^K = +(\d+): biases {_NUMBER}, error {_NUMBER}, bound / error {_NUMBER}, directional bound "
_GRID = r"^\| [\d.]+ \| (?:poly|expo)\w+ \| " + r" \| ".join([r"([\d.]+) \(([\d.]+)\)"] * 6)


@dataclass(frozen=True)
class Claim:
    """Numbers on a page that a command prints.

    Attributes:
        command: Script and arguments, below ``examples``.
        page: Pattern whose groups are the numbers on the page, wherever it fits.
        printed: Pattern whose groups are the same numbers in what is printed; the same pattern if
            not given.
        package: What the command needs beyond the package's own requirements.
    """

    command: str
    page: str
    printed: str = ""
    package: str = ""


CLAIMS = (
    Claim(
        BUDGETS,
        r"order of Euler goes from ([\d.]+) to ([\d.]+)",
        r"Euler,  64 steps.* order ([\d.]+)[\s\S]*Euler, 512 steps.* order ([\d.]+)",
    ),
    Claim(
        BUDGETS,
        r"that of Heun from ([\d.]+) to ([\d.]+)\.",
        r"Heun ,  64 steps.* order ([\d.]+)[\s\S]*Heun , 512 steps.* order ([\d.]+)",
    ),
    Claim(
        BUDGETS,
        _EULER,
        _K + rf".*log-amplification ([\d.]+)(?:, orders {_NUMBER} and {_NUMBER})?$",
    ),
    Claim(BUDGETS, r"order of the error \| ([\d.]+)", r"order of the error ([\d.]+)"),
    Claim(BUDGETS, r"log-amplification \| ([\d.]+) log", r"log-amplification ~ ([\d.]+) log"),
    Claim(BUDGETS, _GRID, r"^epsilon .* steps: error ([\d.]+), bound ([\d.]+)"),
    Claim(
        BUDGETS,
        r"E w² m goes from ([\d.]+) to ([\d.]+)",
        r"E w² m = ([\d.]+)[\s\S]*E w² m = ([\d.]+)",
    ),
    Claim(
        BUDGETS,
        r"E w m stays at ([\d.]+) against ([\d.]+)\.",
        r"E w m = ([\d.]+)[\s\S]*E w m = ([\d.]+)",
    ),
    Claim(
        f"{BUDGET} narrow --solver Heun --quantiles 4096",
        _HEUN,
        _K + rf"/ error {_NUMBER},.*?(?:, orders {_NUMBER} and .*)?$",
    ),
    Claim(
        f"{BUDGET} narrow --width 0.035 --quantiles 4096",
        r"--quantiles 4096` it is ([\d.]+), the log-amplification ([\d.]+) log K",
        r"order of the error ([\d.]+)[\s\S]*log-amplification ~ ([\d.]+) log K",
    ),
    Claim(
        "scale/bank_memory.py",
        r"^\| \w+ +\| +[\d,]+ \| +([\d,]+) \| +[\d,]+ \| +[\d.]+ \| +([\d.]+) \|$",
    ),
    Claim(
        "adapters/adapt_digits.py --quick",
        r"train \| ([\d,]+) of ([\d,]+), ([\d.]+) %",
        r"(\d+) of (\d+) parameters train, ([\d.]+)%",
        "peft",
    ),
)


@dataclass(frozen=True)
class Count:
    """A number on a page that the code gives.

    Attributes:
        page: The folder of the page.
        stated: Pattern whose group is the number.
        what: What is counted.
        found: Counts it.
    """

    page: str
    stated: str
    what: str
    found: Callable[[], float]


def parameters(network: nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


def of_configuration(name: str) -> int:
    """Return the parameters of the network of a configuration."""
    config = yaml.safe_load((EXAMPLES.parent / "configs" / name).read_text())
    with torch.device("meta"):
        settings = config["model"]["init_args"]["network"]["init_args"]
        return parameters(diffusers.UNet2DModel(**settings))


def of_captions() -> int:
    script = run_path(str(EXAMPLES / "captions/captioned_digits.py"))
    return parameters(script["CaptionedDigits"]().network)


def noise_above_one() -> float:
    """Return the share of EDM's draws at s > 1, by its density's quantiles."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    return float((LogNormal().icdf(u) > 1).double().mean())


def confident_digits() -> float:
    confidence, _ = DigitFeatures().probabilities(digits()[0]).max(dim=1)
    return float((confidence > 0.9).float().mean())


COUNTS = (
    Count(
        "cifar10",
        r"([\d.]+) million parameters, VP",
        "parameters of cifar10.yaml",
        lambda: of_configuration("cifar10.yaml") / 1e6,
    ),
    Count(
        "cifar10",
        r"([\d.]+) million parameters where",
        "parameters of cifar10_edm.yaml",
        lambda: of_configuration("cifar10_edm.yaml") / 1e6,
    ),
    Count(
        "evidence",
        r"28 × 28, ([\d.]+) million",
        "parameters in taylor_mnist",
        lambda: parameters(unet([16, 32, 128])) / 1e6,
    ),
    Count(
        "evidence",
        r"U-Net of ([\d.]+) million parameters after",
        "parameters in cifar10_audit",
        lambda: parameters(unet([32, 64, 64], 32, 3)) / 1e6,
    ),
    Count("captions", r"of (\d+),000 weights", "parameters", lambda: of_captions() / 1e3),
    Count(
        "attribution",
        r"MLP of (\d+),000 parameters",
        "parameters",
        lambda: parameters(ResidualMLP(64, width=64, depth=2)) / 1e3,
    ),
    Count(
        "attribution",
        r"which is (\d+) at the end",
        "sigma / alpha of VP",
        lambda: float(VP().noise_level(torch.tensor([VP().t_max]))),
    ),
    Count(
        "digits",
        r"visits s > 1 in (\d+) % of its draws",
        "quantiles of EDM's density",
        lambda: 100 * noise_above_one(),
    ),
    Count(
        "digits",
        r"real digits \| \| \| \| ([\d.]+) %",
        "real digits by the classifier",
        lambda: 100 * confident_digits(),
    ),
)


def check(study: Study) -> int:
    """Print what is compared, and return how many comparisons differ."""
    rows = []
    for count in COUNTS:
        stated = numbers(count.stated, page_of(count.page).read_text())
        rows.append(compared(count.page, count.what, stated, [count.found()]))
    printed: dict[str, str] = {}
    for claim in CLAIMS:
        page = claim.command.split("/")[0]
        if claim.package and find_spec(claim.package) is None:
            rows.append((page, claim.command, "", "", f"not run: needs {claim.package}"))
            continue
        study.check_time()
        if claim.command not in printed:
            printed[claim.command] = output(claim.command)
        stated = numbers(claim.page, page_of(claim.command).read_text())
        found = numbers(claim.printed or claim.page, printed[claim.command])
        rows.append(compared(page, claim.command, stated, found))
    for command in TABLES:
        study.check_time()
        rows.append(lines_of(command))
    print(markdown(("page", "found by", "on the page", "found", ""), rows))
    return sum(row[-1] == "DIFFERS" for row in rows)


def compared(
    page: str, what: str, stated: list[str], found: list[str] | list[float]
) -> tuple[str, ...]:
    """Return the row of a comparison."""
    same = len(stated) == len(found) and all(map(agrees, stated, map(float, found)))
    cells = [
        ", ".join(map(str, each)) if len(each) <= 3 else f"{len(each)} numbers"
        for each in (stated, found)
    ]
    return page, what, *cells, "same" if same else "DIFFERS"


def lines_of(command: str) -> tuple[str, ...]:
    """Return how many lines a script prints, and how many of them its page has."""
    page = page_of(command).read_text().splitlines()
    lines = [line for line in output(command).splitlines() if line]
    there = sum(line in page for line in lines)
    verdict = "same" if there == len(lines) > 0 else "DIFFERS"
    return command.split("/")[0], command, f"{there} lines", f"{len(lines)} lines", verdict


def page_of(name: str) -> Path:
    return EXAMPLES / name.split("/")[0] / "README.md"


def output(command: str) -> str:
    script, *arguments = command.split()
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, EXAMPLES / script, *arguments]
        done = subprocess.run(call, check=True, capture_output=True, text=True, cwd=folder)
    return done.stdout


def numbers(pattern: str, text: str) -> list[str]:
    """Return the groups of a pattern wherever it fits, without commas and empty ones."""
    fits = re.finditer(pattern, text, re.MULTILINE)
    found = [group.replace(",", "") for fit in fits for group in fit.groups() if group]
    if not found:
        raise ValueError(f"{pattern!r} must be in the text: the page or the script has changed.")
    return found


def agrees(stated: str, found: float) -> bool:
    """Return whether the number found rounds to the one stated."""
    digits, _, exponent = stated.partition("e")
    decimals = len(digits.partition(".")[2]) - int(exponent or 0)
    return abs(found - float(stated)) <= 0.5001 * 10**-decimals
