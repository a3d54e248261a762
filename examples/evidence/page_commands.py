"""The commands of README.md and of the studies' pages, each run in small.

They are found in the blocks of bash of the pages themselves. ``RULES`` says how a kind of command
is made small, or why it is not run.
"""

import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from study import processor_seconds

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("examples/*/README.md"))]
PAGES.append(ROOT / "tests/benchmarks/README.md")
LONGEST = 1800
"""Seconds after which a command has failed."""

_QUICK = "--quick"
_FEW_SAMPLES = (
    "--model.sampler.steps 2 --trainer.callbacks+=Evaluation --trainer.callbacks.samples=100 "
    "--trainer.callbacks.repeats=1 --trainer.callbacks.real_samples=100 "
    "--trainer.callbacks.subset_size=10 --trainer.callbacks.likelihood_samples=2"
)
_SMALL_IMAGES = (
    "--model.network.init_args.layers_per_block 1 --model.network.init_args.norm_num_groups 4 "
    "--model.target.init_args.references 16 --data.batch_size 4 --data.num_workers 0 "
    "--trainer.accelerator cpu --trainer.max_steps 2 --model.network.init_args.block_out_channels "
)


@dataclass(frozen=True)
class Rule:
    """How a kind of command is made small.

    Attributes:
        pattern: Found in ``page: command``, where the page is its folder.
        add: What comes after the command; options that are given twice count as given last.
        change: What takes the place of parts of the command.
        reason: Why it is not run, if it is not.
        package: What it needs beyond the package's own requirements.
    """

    pattern: str
    add: str = ""
    change: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    package: str = ""


RULES = (
    Rule(r": pip install ", reason="installs packages"),
    Rule(r": pytest\b", reason="the tests are run by themselves"),
    Rule(r": sbatch ", reason="needs SLURM"),
    Rule(r": torchrun --nnodes", reason="needs two machines"),
    Rule(r": examples/cifar10/measure_on_gpu.sh", reason="needs a GPU"),
    Rule(r"score_distillation: .*job\.yaml", reason="names classes of the reader's own"),
    Rule(
        r": TOY=1 examples/cifar10/measure_on_gpu.sh OUT$",
        "&& cat OUT/parts.txt && ! grep -v 'exit status 0' OUT/parts.txt",
    ),
    Rule(r"adapters: python examples/", _QUICK, package="peft"),
    Rule(r"adapters: .* export ", package="peft"),
    Rule(r"adapters: .* --ckpt_path last", "--trainer.max_steps 4", package="peft"),
    Rule(r"adapters: .* fit ", "--trainer.max_steps 2", package="peft"),
    # the command line of the package
    Rule(r"fit .*configs/cifar10\.yaml", _SMALL_IMAGES + "[8,8,8,8]"),
    Rule(r"fit .*configs/cifar10_edm\.yaml", _SMALL_IMAGES + "[8,8,8] --trainer.devices 2"),
    Rule(
        r"lightning_vr fit .*--trainer\.devices 4",
        "--trainer.devices 2 --trainer.accelerator cpu --trainer.max_steps 2",
        {"--nproc_per_node 4": "--nproc_per_node 2"},
    ),
    Rule(r"-m lightning_vr fit .*--print_config"),
    Rule(r"-m lightning_vr fit .*--ckpt_path last", "--trainer.max_steps 4"),
    Rule(r"-m lightning_vr fit ", "--trainer.max_steps 2"),
    Rule(r"-m lightning_vr predict ", "--num_samples 10"),
    Rule(r"-m lightning_vr test ", _FEW_SAMPLES),
    Rule(r"-m lightning_vr export "),
    Rule(r"-m lightning_vr audit ", "--budget 1 --data.batch_size 8"),
    Rule(r"-m lightning_vr error_budget ", "--samples 4"),
    # scripts that are as small as their data, or take seconds
    Rule(r"python examples/cifar10/(unpack|train_classifier)\.py "),
    Rule(r"python examples/expensive_encode/show_strata\.py"),
    Rule(r"python examples/scale/scale_on_paper\.py"),
    Rule(r"python examples/scale/scale_on_gpu\.py", "--device cpu"),
    Rule(r"python examples/\w+/\w+\.py", _QUICK),
)
"""The first one that fits a command counts."""


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: The page.
        text: The command as the page has it, without a comment.
    """

    page: Path
    text: str

    @property
    def name(self) -> str:
        """Return the page as the report names it: the folder, or README.md."""
        return self.page.name if self.page.parent == ROOT else self.page.parent.name

    @property
    def rule(self) -> Rule:
        """Return the rule that counts.

        Raises:
            ValueError: If there is none.
        """
        for rule in RULES:
            if re.search(rule.pattern, f"{self.name}: {self.text}"):
                return rule
        raise ValueError(
            f"`{self.text}` of {self.name} must have a rule that makes it small or says why it is "
            "not run: add one to RULES of page_commands.py."
        )

    def in_small(self, data: Path | None) -> tuple[str, str]:
        """Return the command that is run, and why it is not, of which one is empty.

        Args:
            data: The folder of images that the pages call FOLDER, if there is one.
        """
        rule, text = self.rule, self.text
        if rule.reason:
            return "", rule.reason
        if rule.package and find_spec(rule.package) is None:
            return "", f"needs {rule.package}"
        for part, other in rule.change.items():
            text = text.replace(part, other)
        if "FOLDER" in text.split():
            if data is None:
                return "", "needs folders of images: --data FOLDER"
            text = text.replace("FOLDER", str(data.absolute()))
        is_small = not rule.add or text.endswith(f" {rule.add}")
        return text if is_small else f"{text} {rule.add}", ""


def commands_of(page: Path) -> Iterator[Command]:
    """Yield the commands in the blocks of bash of a page, in order."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.sub(r"(^|\s)#.*", "", line).split("&&"):
                if part.strip():
                    yield Command(page, " ".join(part.split()))


def prepare(folder: Path, text: str) -> None:
    """Give a folder what readers of a page have: this tree, and files that the page names."""
    for name in ("configs", "examples", "lightning_vr", "tests"):
        (folder / name).symlink_to(ROOT / name)
    if "job.yaml" in text:
        (folder / "job.yaml").write_bytes((ROOT / "configs/eight_gaussians.yaml").read_bytes())
    if "cifar-10-binary.tar.gz" in text:
        write_archive(folder / "cifar-10-binary.tar.gz")


def write_archive(path: Path) -> None:
    """Write an archive as CIFAR-10 has, of a few random images."""
    pixels = np.random.default_rng(0).integers(256, size=(40, 3073), dtype=np.uint8)
    pixels[:, 0] = np.arange(40) % 10
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    files = {f"{name}.bin": pixels.tobytes() for name in (*batches, "test_batch")}
    files["batches.meta.txt"] = "\n".join(f"class_{i}" for i in range(10)).encode()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def run_in(folder: Path, text: str) -> tuple[str, float]:
    """Run a command in a folder.

    Returns:
        The end of what it printed if it failed, else nothing, and the processor seconds it took.
    """
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    one_thread = {"PATH": programs, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = processor_seconds()
    try:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=folder,
            env=os.environ | one_thread,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST,
        )
        failure = done.stdout[-2000:] or f"status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"not done after {LONGEST} s"
    return failure, processor_seconds() - start
