"""Numbers of the studies' pages that are exact, checked against this tree.

Exact are numbers that no random draw and no clock is in: closed forms, quadratures, counts. Each is
read from the page itself, and looked for in what the page's command prints.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from study import Study, markdown

EXAMPLES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Claim:
    """Numbers on a page that a command must print.

    Attributes:
        command: Script and arguments, below ``examples``.
        page: Pattern whose groups are the numbers on the page.
        printed: Pattern whose groups are the same numbers in what is printed.
    """

    command: str
    page: str
    printed: str


ORDERS = "error_budget/error_budget.py orders"
SPLIT = "error_budget/error_budget.py split"
TABLES = "scale/scale_on_paper.py"
"""Each line of whose tables stands on its page."""

CLAIMS = (
    Claim(
        ORDERS,
        r"order of Euler goes from ([\d.]+) to ([\d.]+)",
        r"Euler,  64 steps.* order ([\d.]+)[\s\S]*Euler, 512 steps.* order ([\d.]+)",
    ),
    Claim(
        ORDERS,
        r"that of Heun from ([\d.]+) to ([\d.]+)\.",
        r"Heun ,  64 steps.* order ([\d.]+)[\s\S]*Heun , 512 steps.* order ([\d.]+)",
    ),
    Claim(
        SPLIT,
        r"E w² m goes from ([\d.]+) to ([\d.]+)",
        r"E w² m = ([\d.]+)[\s\S]*E w² m = ([\d.]+)",
    ),
    Claim(
        SPLIT,
        r"E w m stays at ([\d.]+) against ([\d.]+)\.",
        r"E w m = ([\d.]+)[\s\S]*E w m = ([\d.]+)",
    ),
)


def run(study: Study) -> None:
    printed: dict[str, str] = {}
    rows = []
    for claim in CLAIMS:
        study.check_time()
        if claim.command not in printed:
            printed[claim.command] = output(claim.command)
        page = page_of(claim.command)
        stated = numbers(claim.page, page.read_text())
        found = numbers(claim.printed, printed[claim.command])
        same = all(agrees(a, b) for a, b in zip(stated, found, strict=True))
        verdict = "same" if same else "DIFFERS"
        rows.append((name(page), claim.command, ", ".join(stated), ", ".join(found), verdict))
    study.check_time()
    rows.append(lines_of_tables())
    print(markdown(("page", "command", "on the page", "printed", ""), rows))


def lines_of_tables() -> tuple[str, ...]:
    """Return how many lines of tables a script prints, and how many of them its page has."""
    page = page_of(TABLES)
    lines = [line for line in output(TABLES).splitlines() if line.startswith("|")]
    there = sum(line in page.read_text().splitlines() for line in lines)
    verdict = "same" if there == len(lines) > 0 else "DIFFERS"
    return name(page), TABLES, f"{there} lines of tables", f"{len(lines)} lines", verdict


def page_of(command: str) -> Path:
    return EXAMPLES / command.split("/")[0] / "README.md"


def name(page: Path) -> str:
    return str(page.relative_to(EXAMPLES))


def output(command: str) -> str:
    script, *arguments = command.split()
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, EXAMPLES / script, *arguments]
        done = subprocess.run(call, check=True, capture_output=True, text=True, cwd=folder)
    return done.stdout


def numbers(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern!r} must be in the text: the page or the script has changed.")
    return found.groups()


def agrees(stated: str, found: str) -> bool:
    """Return whether the number found rounds to the one stated."""
    decimals = len(stated.partition(".")[2])
    return abs(float(found) - float(stated)) <= 0.5001 * 10**-decimals
