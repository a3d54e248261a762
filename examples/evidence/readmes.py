"""What the pages say, checked against this tree: exact numbers, and that each command runs.

Each page has a folder of its own, in which its commands run in small, one after the other as a
reader types them. What ran in an earlier call on the same tree is not run again.
"""

import hashlib
import tempfile
from pathlib import Path
from textwrap import indent

import exact_numbers
from page_commands import PAGES, ROOT, commands_of, prepare, run_in
from study import CheckFailedError, Study, Table

KEYS = ("tree", "page", "command")


def run(study: Study) -> None:
    differing = exact_numbers.check(study)
    table = Table(study.folder / "readmes.csv", KEYS, ("seconds",))
    tree = digest()
    print("\n| page | command | | processor seconds |\n|---|---|---|---|")
    failed = sum(run_page(page, study, table, tree) for page in PAGES)
    if differing or failed:
        raise CheckFailedError(f"{differing} numbers or tables differ, {failed} commands failed.")


def run_page(page: Path, study: Study, table: Table, tree: str) -> int:
    """Run the commands of a page, print a line for each, and return how many failed."""
    commands = [(command, *command.in_small(study.data)) for command in commands_of(page)]
    keys = {
        small: dict(zip(KEYS, (tree, command.name, small), strict=True))
        for command, small, _ in commands
        if small
    }
    results = earlier(table, keys)
    is_new = not results
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), page.read_text())
        for command, small, reason in commands:
            line = f"| {command.name} | `{command.text}` |"
            if not small:
                print(f"{line} not run: {reason} | |", flush=True)
                continue
            if small not in results:
                study.check_time()
                results[small] = run_in(Path(folder), small)
            failure, seconds = results[small]
            print(f"{line} {'FAILED' if failure else 'ran'} | {seconds:.0f} |", flush=True)
            if failure:
                print(indent(f"\n{small}\n{failure}\n", "    "), flush=True)
    failed = sum(bool(failure) for failure, _ in results.values())
    if is_new and not failed:
        for small, key in keys.items():
            table.add(**key, seconds=results[small][1])
    return failed


def earlier(table: Table, keys: dict[str, dict[str, str]]) -> dict[str, tuple[str, float]]:
    """Return the results of a page whose commands have all run, else nothing."""
    if not all(table.has(*key.values()) for key in keys.values()):
        return {}
    return {small: ("", table.select("seconds", **key)[0]) for small, key in keys.items()}


def digest() -> str:
    """Return a number of what the commands run: code, configurations and pages."""
    found = hashlib.sha256()
    for folder in ("lightning_vr", "configs", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".pt", ".sh", ".yaml", ".md"):
                found.update(path.read_bytes())
    return found.hexdigest()[:12]
