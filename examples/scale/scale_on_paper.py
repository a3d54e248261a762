"""Compute what each kind of references costs a rank on 8 and 64 GPUs, on paper.

    python examples/scale/scale_on_paper.py            # the tables, from formulas
    python examples/scale/scale_on_paper.py --check    # against two processes on this CPU

Each of W ranks has b = B/W draws of d numbers. The formulas are those of what the code does; the
``README.md`` of this folder explains them. ``--check`` counts bytes, memory and FLOP at small
sizes. Times follow from the formulas and from data sheets; ``scale_on_gpu.py`` compares them with a
GPU.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock
from weakref import finalize

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_vr import DSM, STF, Clean, Noised
from lightning_vr.core.rng import generator
from lightning_vr.lifecycle.training_set import encoded_training_set
from lightning_vr.posterior.references import chunk_length
from lightning_vr.training.reference_bank import set_references

FLOAT, INTEGER = 4, 8  # bytes
# bytes read and written: for each pair of query and reference, and if they have labels
LOGIT_PASSES, LABEL_PASSES = 86, 12
# for each number of a query in each chunk: by the products, and by the scaling of their sums
PRODUCT_PASSES, DECAY_PASSES = 12, 8
# for each number of a rank's own queries, and of all ranks' queries where references are sharded
OWN_PASSES, SHARED_PASSES = 190, 78
# for each number of a drawn reference, and of a reference from the batch
DRAWN_PASSES, BATCH_PASSES = 8, 24


@dataclass(frozen=True)
class Workload:
    """n samples of d numbers, B draws a step over all ranks, and a network's published step."""

    name: str
    count: int
    dim: int
    batch: int
    classes: int
    gpu_seconds: float = 0.0
    published: str = ""
    encoder_flop: float = 0.0

    @property
    def label(self) -> int:
        """Number of labels of a sample."""
        return int(self.classes > 0)


@dataclass(frozen=True)
class Machine:
    """GPUs by their data sheet (bytes, FLOP/s, bytes/s each way) and the fraction that is reached.

    H100 SXM5, NVIDIA's data sheet: 80 GB of HBM3 at 3.35 TB/s; float32 67 TFLOP/s; TF32 989 with
    sparsity, so half of that; NVLink 900 GB/s both ways. DGX H100: one 400 Gbit/s port for each
    GPU. The efficiencies are assumptions.
    """

    gpus: int
    per_node: int = 8
    memory: float = 80e9
    float32: float = 67e12
    tf32: float = 494.5e12
    hbm: float = 3.35e12
    intra_node: float = 450e9
    inter_node: float = 50e9
    matmul_efficiency: float = 0.7
    bandwidth_efficiency: float = 0.8


@dataclass(frozen=True)
class Mode:
    """The source of references; None for denoising score matching, which has none."""

    references: int | Literal["batch", "all"] | None
    sharded: bool = False

    def __str__(self) -> str:
        if self.references is None:
            return "DSM()"
        where = f'"{self.references}"' if isinstance(self.references, str) else self.references
        return f"STF({where}, sharded)" if self.sharded else f"STF({where})"


MODES = [
    Mode(None),
    Mode("batch"),
    Mode(4096),
    Mode(4096, sharded=True),
    Mode("all"),
    Mode("all", sharded=True),
]
DAY = 86400
WORKLOADS = [
    # github.com/NVlabs/edm, README and docs/train-help.txt: GPUs, days, batch, images
    Workload("CIFAR-10", 50_000, 3072, 512, 10, 8 * 2 * DAY * 512 / 200e6, "EDM on V100"),
    Workload(
        "ImageNet-64", 1_281_167, 12288, 4096, 1000, 32 * 13 * DAY * 4096 / 2.5e9, "EDM on A100"
    ),
    # github.com/chuanyangjin/fast-DiT, README: 0.84 steps of 128 a second on one A100, XL/2. The
    # encoder is AutoencoderKL of Stable Diffusion at 256 x 256: `FlopCounterMode` on "meta"
    Workload(
        "ImageNet-256 latents",
        1_281_167,
        4096,
        256,
        1000,
        256 / 128 / 0.84,
        "DiT-XL/2 on A100",
        273e9,
    ),
]


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank gives to each kind of collective; to an all-to-all, for each rank."""

    gathered: float = 0.0
    exchanged: float = 0.0
    reduced: float = 0.0
    broadcast: float = 0.0

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends."""
        others = (ranks - 1) * (self.gathered + self.exchanged)
        return others + 2 * (ranks - 1) / ranks * self.reduced + self.broadcast

    def seconds(self, on: Machine) -> float:
        """Return the time by rings, where data for all enter a node once, through all its ports."""
        inside = min(on.gpus, on.per_node)
        outside, efficiency = on.gpus - inside, on.bandwidth_efficiency
        shared = self.gathered + 2 * self.reduced / on.gpus + self.broadcast / (on.gpus - 1)
        rings = [(on.gpus - 1) * shared / on.intra_node, outside / inside * shared / on.inter_node]
        exchange = [(inside - 1) / on.intra_node, outside / on.inter_node]
        return (max(rings) + self.exchanged * max(exchange)) / efficiency


@dataclass(frozen=True)
class Cost:
    """What a rank stores, its peak of temporary memory, what it sends and computes in a step."""

    bank: float = 0.0
    fill_peak: float = 0.0
    fill_sent: float = 0.0
    temporaries: float = 0.0
    sent: float = 0.0
    flop: float = 0.0
    moved: float = 0.0


def stored_references(work: Workload, mode: Mode, ranks: int) -> int:
    """Return the number of references in a rank's bank."""
    if mode.references in (None, "batch"):
        return 0
    return math.ceil(work.count / ranks) if mode.sharded else work.count


def visited(work: Workload, mode: Mode, ranks: int) -> tuple[float, float]:
    """Return the queries that a rank answers in a step, and the references that it uses."""
    counts = {None: 0, "batch": work.batch, "all": work.count}
    references = counts[mode.references] if mode.references in counts else int(mode.references or 0)
    if mode.sharded:
        return work.batch, references / ranks
    return work.batch / ranks, references


def chunk(work: Workload, mode: Mode, ranks: int, device: str) -> float:
    """Return how many references are compared at a time."""
    queries, references = visited(work, mode, ranks)
    return min(references, chunk_length(int(queries), work.dim, torch.device(device)))


def bank(work: Workload, mode: Mode, ranks: int) -> float:
    """Return bytes of rows with squared norms and labels, and with positions if sharded."""
    rows = stored_references(work, mode, ranks)
    each = FLOAT * (work.dim + 1) + INTEGER * (work.label + mode.sharded)
    return rows * each + (FLOAT * work.dim if rows else 0)


def fill_peak(work: Workload, mode: Mode, ranks: int) -> float:
    """Return bytes to gather: the rank's part twice, and the set twice, in parts and joined."""
    rows, part = stored_references(work, mode, ranks), math.ceil(work.count / ranks)
    if rows == 0:
        return 0
    if mode.sharded:
        batches = 2 * FLOAT * work.batch / ranks * work.dim  # one is read while another is encoded
        return bank(work, mode, ranks) + INTEGER * rows + batches
    whole = FLOAT * work.dim * (2 * part + ranks * part + work.count)
    return whole + INTEGER * (part * (1 + work.label) + work.count)


def fill_traffic(work: Workload, mode: Mode, ranks: int) -> Traffic:
    """Return the traffic to fill a bank, where each rank has encoded every W-th sample."""
    if stored_references(work, mode, ranks) == 0:
        return Traffic()
    if mode.sharded:
        return Traffic(gathered=INTEGER, reduced=FLOAT * work.dim)
    part, columns = math.ceil(work.count / ranks), 2 + work.label
    return Traffic(gathered=INTEGER * (columns * (1 + part) + 1) + FLOAT * work.dim * part)


def step_traffic(work: Workload, mode: Mode, ranks: int) -> Traffic:
    """Return the traffic: the batch to all; or queries, sums back and drawn positions."""
    own = work.batch / ranks
    if mode.references == "batch":
        return Traffic(gathered=INTEGER * (1 + work.label * own) + FLOAT * own * work.dim)
    if not mode.sharded:
        return Traffic()
    asked = 3 * INTEGER + own * (INTEGER * (1 + work.label) + FLOAT * (work.dim + 3))
    drawn = 0 if mode.references == "all" else INTEGER * int(mode.references or 0)
    return Traffic(asked, exchanged=FLOAT * own * (work.dim + 6), broadcast=drawn)


def temporaries(work: Workload, mode: Mode, ranks: int, device: str) -> float:
    """Return the peak of temporary bytes: logits of a chunk twice, and some copies of the rows."""
    queries, references = visited(work, mode, ranks)
    if references == 0:
        return 2 * FLOAT * queries
    own, dim = work.batch / ranks * work.dim, work.dim
    logits = 2 * queries * chunk(work, mode, ranks, device)
    peak = max(4 * own + logits, 6 * own)
    if mode.sharded:
        wide = queries * (dim + 6)
        peak = 3 * own + max(2 * wide + logits, 4 * wide, 2 * wide + 2 * own)
    if mode.references == "batch":
        return FLOAT * max(queries * ranks * dim + peak, 2 * work.batch * dim + own)
    if mode.references == "all":
        return FLOAT * peak
    return FLOAT * references * dim + max(2 * INTEGER * work.count, FLOAT * peak)


def row_visits(work: Workload, mode: Mode, ranks: int, device: str) -> float:
    """Return the numbers of all queries, once for each chunk."""
    queries, references = visited(work, mode, ranks)
    return math.ceil(references / chunk(work, mode, ranks, device)) * queries * work.dim


def matrices(work: Workload, mode: Mode, ranks: int, device: str) -> float:
    """Return bytes of both products: references twice, and the queries' rows in each chunk."""
    _, references = visited(work, mode, ranks)
    if references == 0:
        return 0
    return 2 * FLOAT * references * work.dim + PRODUCT_PASSES * row_visits(
        work, mode, ranks, device
    )


def passes(work: Workload, mode: Mode, ranks: int, device: str) -> float:
    """Return bytes of everything else: passes over logits and rows, copies."""
    queries, references = visited(work, mode, ranks)
    if references == 0:
        return 2 * FLOAT * queries
    moved = queries * references * (LOGIT_PASSES + LABEL_PASSES * work.label)
    moved += DECAY_PASSES * row_visits(work, mode, ranks, device)
    moved += OWN_PASSES * work.batch / ranks * work.dim
    if mode.sharded:
        moved += SHARED_PASSES * queries * work.dim
    if isinstance(mode.references, int):
        moved += DRAWN_PASSES * references * work.dim
    if mode.references == "batch":
        moved += BATCH_PASSES * references * work.dim
    return moved


def cost(work: Workload, mode: Mode, ranks: int, device: str = "cuda") -> Cost:
    """Return all costs for 2 or more ranks."""
    queries, references = visited(work, mode, ranks)
    return Cost(
        bank=bank(work, mode, ranks),
        fill_peak=fill_peak(work, mode, ranks),
        fill_sent=fill_traffic(work, mode, ranks).sent(ranks),
        temporaries=temporaries(work, mode, ranks, device),
        sent=step_traffic(work, mode, ranks).sent(ranks),
        flop=4 * queries * references * work.dim,
        moved=matrices(work, mode, ranks, device) + passes(work, mode, ranks, device),
    )


def seconds(work: Workload, mode: Mode, on: Machine) -> float:
    """Return what STF adds to a step: products, then passes over memory, then communication."""
    hbm = on.hbm * on.bandwidth_efficiency
    compute = cost(work, mode, on.gpus).flop / (on.float32 * on.matmul_efficiency)
    products = max(compute, matrices(work, mode, on.gpus, "cuda") / hbm)
    link = step_traffic(work, mode, on.gpus).seconds(on)
    return products + passes(work, mode, on.gpus, "cuda") / hbm + link


def _in_place_flop(into: Any, left: Any, right: Any, **options: Any) -> int:
    return 2 * math.prod(left) * right[1]


IN_PLACE = {torch.ops.aten.addmm_: _in_place_flop}  # torch 2.13 does not count its FLOP

# how often operations touch their results, where they do not touch all of their arguments
TOUCHED = {"index": 2, "copy_": 2, "zeros_like": 1, "new_zeros": 1, "gather": 0, "scatter_": 0}
TOUCHED |= {"ones_like": 1, "empty_like": 0, "new_empty": 0}
TOUCHED |= {"allgather_": 0, "alltoall_base_": 0, "broadcast_": 0}


class Watch(TorchDispatchMode):
    """Records the peak of bytes beyond those at the start, and bytes read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.moved = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self._note(given, 0)
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self._note(made, 1)
        self.peak = max(self.peak, self.alive)
        factor = 0 if func.is_view else TOUCHED.get(func.overloadpacket.__name__)
        touched = [*given, *made] if factor is None else factor * made
        self.moved += sum(x.numel() * x.element_size() for x in touched)
        return out

    def _note(self, tensors: list[torch.Tensor], factor: int) -> None:
        for storage in (x.untyped_storage() for x in tensors):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.alive += factor * storage.nbytes()
                finalize(storage, self._free, storage._cdata, factor * storage.nbytes())

    def _free(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.alive -= size


@contextmanager
def counted(ranks: int) -> Iterator[list[float]]:
    """Record what each collective makes this rank send."""
    sent: list[float] = []
    factors = {"all_gather": ranks - 1, "all_to_all_single": (ranks - 1) / ranks}
    factors |= {"all_reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0}

    def counting(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> None:
            given = args[1] if name.startswith("all_") and name != "all_reduce" else args[0]
            sent.append(factors[name] * given.numel() * given.element_size())
            whole(*args, **options)
            time.sleep(0.01)  # gloo's thread needs Python's lock to release tensors

        return call

    with ExitStack() as stack:
        for name in factors:
            stack.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        yield sent


def stored(target: torch.nn.Module) -> int:
    """Return bytes of the storages of a target's bank."""
    prepared = getattr(target, "bank", None)
    if prepared is None:
        return 0
    parts = [*vars(prepared.local).values(), getattr(prepared, "positions", None)]
    return sum(x.untyped_storage().nbytes() for x in parts if x is not None)


def as_trainer(count: int, batch: int) -> Any:
    """Return what the pass over the training set needs of a trainer; samples are positions."""
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), batch_to_device=lambda batch, dataloader_idx: batch
    )
    return SimpleNamespace(
        train_dataloader=DataLoader(range(count), batch_size=batch),
        strategy=strategy,
        precision_plugin=Precision(),
        lightning_module=LightningModule(),
        is_global_zero=False,
        progress_bar_callback=None,
    )


def noised_by(own: Clean, source: torch.Generator) -> Noised:
    """Return one draw of each sample at noise levels from 0.3 to 10."""
    sigma = torch.logspace(-0.5, 1, len(own.x0))
    noise = torch.randn(own.x0.shape, generator=source)
    one = torch.ones_like(sigma)
    xt = own.x0 + sigma[:, None] * noise
    return Noised(xt, own.x0, noise, sigma, one, sigma, one, own.group, index=own.index)


def measured(work: Workload, mode: Mode, ranks: int, rank: int) -> Cost:
    """Fill a bank, then estimate the targets of a second step."""
    target = DSM() if mode.references is None else STF(mode.references, sharded=mode.sharded)
    source = generator("scale")
    x0 = torch.randn(work.count, work.dim, generator=source)
    group = torch.arange(work.count) % work.classes if work.label else None
    everything = Clean(x0, group, index=torch.arange(work.count))
    with Watch() as filling, counted(ranks) as fill_sent:
        if target.bank_size != 0:
            encode = lambda positions, batch: everything.rows(batch)  # noqa: E731
            trainer = as_trainer(work.count, work.batch // ranks)
            clean = encoded_training_set(trainer, encode, "", is_shard=target.sharded)
            set_references(target, clean)
    own = everything.rows(slice(rank, work.batch, ranks))
    noised = noised_by(own, generator("scale", rank))
    target(noised, own, generator("scale", "warm-up"))
    watch, flop = Watch(), FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with counted(ranks) as sent, watch, flop:
        estimate = target(noised, own, generator("scale", "step"))
    assert torch.isfinite(estimate.x0).all()
    step = (watch.peak, sum(sent), flop.get_total_flops(), watch.moved)
    return Cost(stored(target), filling.peak, sum(fill_sent), *step)


def _on_rank(rank: int, ranks: int, folder: str, work: Workload, modes: list[Mode]) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=ranks)
    found = [astuple(measured(work, mode, ranks, rank)) for mode in modes]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_processes(work: Workload, modes: list[Mode], ranks: int) -> list[Cost]:
    """Return the measurements of the first of some processes, with the mean FLOP of all."""
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, folder, work, modes)
        multiprocessing.start_processes(_on_rank, given, nprocs=ranks, start_method="fork")
        files = [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]
    flop = [sum(row[5] for row in rows) / ranks for rows in zip(*files, strict=True)]
    costs = [Cost(*row) for row in files[0]]
    return [replace(each, flop=mean) for each, mean in zip(costs, flop, strict=True)]


def short(value: float) -> str:
    """Return two digits, or all before the point; 0 where it does not matter."""
    if value < 1e-3:
        return "0"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def aligned(rows: list[list[str]]) -> str:
    """Return a table in Markdown; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])], *rows[1:]]
    sides = [str.ljust] + [str.rjust] * (len(widths) - 1)
    padded = (
        [side(c, w) for side, c, w in zip(sides, cells, widths, strict=True)] for cells in rows
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def row(work: Workload, mode: Mode, on: Machine) -> list[str]:
    """Return what a mode costs a rank; * where filling takes more memory than a GPU has."""
    found = cost(work, mode, on.gpus)
    taken = seconds(work, mode, on)
    references = visited(work, mode, on.gpus)[1] * (on.gpus if mode.sharded else 1)
    much = "*" if found.fill_peak > on.memory else ""
    numbers = [references / work.classes, found.bank / 1e9, found.fill_peak / 1e9]
    numbers += [found.temporaries / 1e9, found.sent / 1e6, found.flop / 1e9, 1e3 * taken]
    cells = [short(x) for x in (*numbers, 100 * taken * on.gpus / work.gpu_seconds)]
    cells[2] += much
    return [str(mode), *cells]


HEAD = ["", "of own class", "bank GB", "to fill", "temporary GB", "sent MB", "GFLOP", "ms"]
HEAD += ["% of that step"]


def table(work: Workload, on: Machine) -> str:
    """Return what each mode costs a rank, and what it takes to fill the bank."""
    published = float(f"{1e3 * work.gpu_seconds / on.gpus:.2g}")
    step = f"a step of {work.published} takes {published:,.0f} ms"
    sizes = f"n = {work.count:,}, d = {work.dim:,}, B = {work.batch:,}, {work.classes} classes"
    part, sent = math.ceil(work.count / on.gpus), fill_traffic(work, Mode("all"), on.gpus)
    filled = f"Filling: {part:,} samples a rank to encode"
    if work.encoder_flop:
        filled += f", {part * work.encoder_flop / on.tf32 / on.matmul_efficiency:.0f} s in TF32"
    filled += (
        f"; {sent.sent(on.gpus) / 1e9:.3g} GB sent to replicate them, {sent.seconds(on):.2g} s."
    )
    title = f"**{work.name} on {on.gpus} GPUs** ({sizes}; {step})"
    return "\n\n".join([title, aligned([HEAD, *(row(work, m, on) for m in MODES)]), filled])


def check(found: Cost, expected: Cost) -> None:
    """Raise if formulas are not what is counted: exactly, or in their leading terms."""
    for name in ("bank", "fill_sent", "sent", "flop"):
        assert getattr(found, name) == getattr(expected, name), (name, found, expected)
    for name in ("fill_peak", "temporaries", "moved"):
        counted, formula = getattr(found, name), getattr(expected, name)
        assert abs(counted - formula) <= 0.1 * formula, (name, found, expected)


def compare(ranks: int = 2) -> None:
    """Print what processes of this machine count next to the formulas."""
    work = Workload("check", 8001, 192, 600, 10)
    modes = [replace(mode, references=256) if mode.references == 4096 else mode for mode in MODES]
    rows = [["", *(field.name for field in fields(Cost))]]
    for mode, found in zip(modes, on_processes(work, modes, ranks), strict=True):
        expected = cost(work, mode, ranks, "cpu")
        check(found, expected)
        pairs = zip(astuple(found), astuple(expected), strict=True)
        rows.append([str(mode), *(f"{a / 1e3:,.1f} / {b / 1e3:,.1f}" for a, b in pairs)])
    sizes = f"n = {work.count:,}, d = {work.dim}, B = {work.batch}, {work.classes} classes"
    print(f"{ranks} processes, {sizes}: thousands counted / by formula\n\n{aligned(rows)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="count on this machine, and compare")
    if parser.parse_args().check:
        return compare()
    for gpus in (8, 64):
        for work in WORKLOADS:
            print(table(work, Machine(gpus)), end="\n\n")
    return None


if __name__ == "__main__":
    main()
