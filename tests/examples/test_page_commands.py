"""The commands and exact numbers of the pages: `pytest -m slow` runs all commands in small.

`pytest -n 0 -m slow tests/examples/test_page_commands.py -k scale` runs those of one page.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [Path("README.md"), *sorted(p.relative_to(ROOT) for p in ROOT.glob("examples/*/README.md"))]
PAGES.append(Path("tests/benchmarks/README.md"))


@pytest.fixture
def commands(load):
    return load("page_commands")


def page_with(folder, *lines):
    """A page of a study that has a block of these lines."""
    page = folder / "study/README.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(["# Study", "```bash", *lines, "```"]) + "\n")
    return page


def test_commands_are_found_as_a_shell_reads_them(commands, tmp_path):
    lines = ["# first", "pip install a && A=1 python b.py  # then", "python c.py \\", "  --d 'e'"]
    found = [each.text for each in commands.commands_of(page_with(tmp_path, *lines))]
    assert found == ["pip install a", "A=1 python b.py", "python c.py --d 'e'"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_each_command_of_a_page_is_made_small_or_has_a_reason(commands, page):
    assert ROOT / page in commands.PAGES
    for command in commands.commands_of(ROOT / page):
        small, reason = command.in_small(Path("images"))
        assert bool(small) != bool(reason)
        if small.endswith("--quick"):
            (script,) = re.findall(r"examples/\S+\.py", small)
            assert 'add_argument("--quick"' in (ROOT / script).read_text(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_stand_in_blocks_that_say_bash(page):
    text = re.sub(r"^```bash\n.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    assert not re.findall(r"^ *(?:\w+=\S+ )*(?:python|pip|pytest|torchrun) .*", blocks, re.M)


def test_each_rule_makes_a_command_small(commands):
    used = [each.rule for page in commands.PAGES for each in commands.commands_of(page)]
    assert [rule.pattern for rule in commands.RULES if rule not in used] == []


def test_a_command_that_no_rule_covers_is_noticed(commands, tmp_path):
    (command,) = commands.commands_of(page_with(tmp_path, "make figures"))
    with pytest.raises(ValueError, match="`make figures` of study must have a rule"):
        command.in_small(None)


def test_a_command_that_needs_images_waits_for_them(commands):
    command = commands.Command(commands.PAGES[0], "python examples/a/b.py --data FOLDER")
    assert command.in_small(None) == ("", "needs folders of images: --data FOLDER")
    small, _ = command.in_small(Path("/images"))
    assert small == "python examples/a/b.py --data /images --quick"


def test_a_page_says_which_commands_fail_and_what_ran_is_not_run_again(
    load, commands, monkeypatch, capsys, tmp_path
):
    readmes, study = load("readmes"), load("study")
    monkeypatch.setattr(
        commands, "RULES", (commands.Rule("sbatch", reason="far"), commands.Rule(""))
    )
    table = study.Table(tmp_path / "readmes.csv", readmes.KEYS, ("seconds",))
    run = [study.Study(tmp_path), table, "tree"]

    bad = page_with(tmp_path, "ls configs", "echo wrong; exit 3", "sbatch x")
    assert readmes.run_page(bad, *run) == 1
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| study \| `ls configs` \| ran \| \d+ \|", printed[0])
    assert printed[1].startswith("| study | `echo wrong; exit 3` | FAILED |")
    assert "    wrong" in printed
    assert printed[-1] == "| study | `sbatch x` | not run: far | |"
    assert table.rows == []

    good = page_with(tmp_path, f"echo ran >> {tmp_path}/log")
    for _ in range(2):
        assert readmes.run_page(good, *run) == 0
    assert (tmp_path / "log").read_text() == "ran\n"
    assert readmes.run_page(good, *run[:2], "another tree") == 0
    assert (tmp_path / "log").read_text() == "ran\nran\n"


def test_a_number_on_a_page_that_changed_is_noticed(load, monkeypatch, capsys, tmp_path):
    exact = load("exact_numbers")
    (claim,) = [each for each in exact.CLAIMS if each.page.startswith("E w m")]
    monkeypatch.setattr(exact, "CLAIMS", [claim])
    monkeypatch.setattr(exact, "COUNTS", exact.COUNTS[:1])
    monkeypatch.setattr(exact, "TABLES", exact.TABLES[:1])
    page = exact.page_of("scale").read_text().splitlines()
    line = next(line for line in page if line.startswith("| STF"))
    for number, cells, parameters, differing in (
        ("9.2248", "", 35.7463e6, 0),
        ("9.2148", "1", 35.7503e6, 3),
    ):
        texts = {claim.command: f"E w m = {number}\nE w m = 9.2423", exact.TABLES[0]: line + cells}
        monkeypatch.setattr(exact, "output", texts.get)
        monkeypatch.setattr(exact, "of_configuration", lambda name, found=parameters: found)
        assert exact.check(load("study").Study(tmp_path)) == differing
        assert capsys.readouterr().out.count("| DIFFERS |") == differing


@pytest.mark.parametrize(
    ("stated", "agreeing", "other"),
    [("0.16", 0.1649, 0.1651), ("9.23e-05", 9.234e-5, 9.236e-5), ("1281", 1281.4, 1281.6)],
)
def test_a_number_agrees_that_rounds_to_the_one_stated(load, stated, agreeing, other):
    agrees = load("exact_numbers").agrees
    assert agrees(stated, agreeing)
    assert not agrees(stated, other)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_commands_of_a_page_run_in_small(load, page, tmp_path):
    readmes, study = load("readmes"), load("study")
    table = study.Table(tmp_path / "readmes.csv", readmes.KEYS, ("seconds",))
    assert readmes.run_page(ROOT / page, study.Study(tmp_path), table, "tree") == 0


@pytest.mark.slow
def test_exact_numbers_of_the_pages_are_those_of_this_tree(load, tmp_path):
    assert load("exact_numbers").check(load("study").Study(tmp_path)) == 0
