"""The costs of STF on paper against counts of processes that communicate by gloo."""

import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_vr import posterior_mean

EXAMPLE = Path(__file__).parents[2] / "examples/scale/scale_on_paper.py"


@pytest.fixture(scope="module")
def paper():
    """The names of the example, as a module has them."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE), run_name="scale_on_paper"))


def drawing(paper, count):
    """All modes, with so many references drawn."""
    return [replace(m, references=count) if m.references == 4096 else m for m in paper.MODES]


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("ranks", "sizes", "drawn"),
    [
        pytest.param(2, (4001, 192, 800, 10), 256, id="labels, two chunks"),
        pytest.param(2, (1003, 768, 32, 0), 300, id="no labels, one chunk"),
        pytest.param(3, (1001, 512, 48, 7), 200, id="three ranks"),
    ],
)
def test_memory_traffic_and_flop_are_those_of_the_formulas(paper, ranks, sizes, drawn):
    work, modes = paper.Workload("small", *sizes), drawing(paper, drawn)
    for mode, found in zip(modes, paper.on_processes(work, modes, ranks), strict=True):
        expected = paper.cost(work, mode, ranks, "cpu")
        for name in ("bank", "fill_sent", "sent", "flop"):
            assert getattr(found, name) == getattr(expected, name), (str(mode), name)
        for name in ("fill_peak", "temporaries", "moved"):
            error = abs(getattr(found, name) - getattr(expected, name))
            assert error <= 0.1 * getattr(expected, name), (str(mode), name, found, expected)


def test_wrong_formulas_are_refused(paper):
    work = paper.Workload("small", 1000, 64, 32, 10)
    expected = paper.cost(work, paper.Mode("all", sharded=True), 2)
    paper.check(expected, expected)
    for name, factor in {"sent": 1.001, "flop": 0.5, "temporaries": 1.2, "moved": 0.8}.items():
        with pytest.raises(AssertionError, match=name):
            paper.check(replace(expected, **{name: factor * getattr(expected, name)}), expected)


@pytest.mark.parametrize("number", range(3))
def test_sharding_divides_the_bank_but_not_the_work(paper, number):
    work = paper.WORKLOADS[number]
    for ranks in (2, 8, 64):
        whole, shared = (paper.cost(work, paper.Mode("all", s), ranks) for s in (False, True))
        assert shared.flop == pytest.approx(whole.flop)
        assert ranks * whole.flop == pytest.approx(4 * work.batch * work.count * work.dim)
        # 4-byte numbers of a sample; its position, norm and label are small beside them
        assert shared.bank == pytest.approx(whole.bank / ranks, rel=5e-3)
        queries = 4 * work.batch * work.dim * (ranks - 1) / ranks
        assert shared.sent == pytest.approx(2 * queries, rel=5e-3)
        assert shared.fill_peak < 1.05 * shared.bank
        assert whole.fill_peak > 2 * whole.bank


def test_a_step_takes_longer_than_its_products_at_the_peak(paper):
    for work in paper.WORKLOADS:
        for mode in paper.MODES[1:]:
            few, many = (paper.seconds(work, mode, paper.Machine(gpus)) for gpus in (8, 64))
            assert 0 < few < 1
            assert 0 < many < 1
            assert few > paper.cost(work, mode, 8).flop / 67e12


def test_a_ring_between_nodes_is_as_fast_as_all_of_their_ports(paper):
    """64 GPUs in 8 nodes: 7 parts of 8 nodes come in by 8 ports, 63 parts pass each NVLink."""
    on = replace(paper.Machine(64), bandwidth_efficiency=1.0)
    seconds = paper.Traffic(gathered=1e9).seconds(on)
    assert seconds == pytest.approx(max(56 / 8 / 50, 63 / 450))
    assert paper.Traffic(exchanged=1e9).seconds(on) == pytest.approx(56 / 50)
    alone = replace(on, gpus=8)
    assert paper.Traffic(gathered=1e9).seconds(alone) == pytest.approx(7 / 450)


def test_the_encoder_takes_the_flop_that_are_stated(paper):
    from diffusers import AutoencoderKL

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
        )
        encoder.encode(torch.empty(1, 3, 256, 256))
    assert counter.get_total_flops() == pytest.approx(paper.WORKLOADS[2].encoder_flop, rel=0.01)


def test_tables_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale_on_paper.py"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    for mode in ("DSM()", 'STF("batch")', "STF(4096)", 'STF("all")', 'STF("all", sharded)'):
        assert sum(line.startswith(f"| {mode} ") for line in lines) == 6
    page = EXAMPLE.with_name("README.md").read_text()
    assert [line for line in lines if line and line not in page] == []


def test_a_ranks_part_of_the_queries_and_references_is_timed(paper, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    example = runpy.run_path(str(EXAMPLE.with_name("scale_on_gpu.py")), run_name="scale_on_gpu")
    calls = []

    def spy(xt, alpha, sigma, references, **options):
        calls.append((len(xt), len(references)))
        return posterior_mean(xt, alpha, sigma, references, **options)

    monkeypatch.setitem(example["milliseconds"].__globals__, "posterior_mean", spy)
    work = paper.Workload("small", 640, 12, 32, 4)
    for mode, sizes in {("all", False): (4, 640), ("all", True): (32, 80)}.items():
        assert example["milliseconds"](work, paper.Mode(*mode), torch.device("cpu")) > 0
        assert set(calls) == {sizes}
        calls.clear()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "mapped"])
def test_a_bank_of_each_kind_is_measured(monkeypatch, tmp_path, kind):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    example = runpy.run_path(str(EXAMPLE.with_name("bank_memory.py")), run_name="bank_memory")
    names = example["measure"].__globals__
    for name, value in {"SHAPE": (1, 2, 3), "BATCH": 4, "SHARD": 8, "STEPS": 1}.items():
        monkeypatch.setitem(names, name, value)
    example["write_cache"](tmp_path, 16, torch.bfloat16)
    answers = []
    example["measure"](kind, str(tmp_path), answers.append)
    ((own, files, _),) = answers
    assert own < files
    numbers = {"float32": 4, "bfloat16": 2, "mapped": 0}[kind]
    paper = 1e6 * (example["on_paper"](1000, numbers) - example["on_paper"](0, numbers))
    assert paper == pytest.approx(1000 * (6 * numbers + 4))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="drops files from Linux's cache")
@pytest.mark.parametrize("reads_ahead", [False, True])
def test_the_wait_for_drawn_references_is_a_part_of_a_step(monkeypatch, tmp_path, reads_ahead):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    example = runpy.run_path(str(EXAMPLE.with_name("reading_ahead.py")), run_name="reading_ahead")
    for names in (example["measure"].__globals__, example["write_cache"].__globals__):
        for name, value in {"SHAPE": (4, 4, 4), "SHARD": 8}.items():
            monkeypatch.setitem(names, name, value)
    for name, value in {"BATCH": 4, "DRAWN": 6, "STEPS": 2}.items():
        monkeypatch.setitem(example["measure"].__globals__, name, value)
    example["write_cache"](tmp_path, 16, torch.float32)
    kept, answers = [], []
    example["squared_norms"](str(tmp_path), kept.append)
    example["measure"](str(tmp_path), kept[0], reads_ahead, True, answers.append)
    ((waited, step, cpu),) = answers
    assert 0 < waited < step
    assert cpu > 0


@pytest.fixture
def on_gpu(paper, monkeypatch):
    """The names of the script for a GPU."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    return runpy.run_path(str(EXAMPLE.with_name("scale_on_gpu.py")), run_name="scale_on_gpu")


def test_posterior_means_are_compared_with_other_ways_in_one_run(on_gpu, monkeypatch):
    monkeypatch.setitem(on_gpu["ratios"].__globals__, "ROUNDS", 1)
    row = on_gpu["ratios"](64, 8, 6, torch.device("cpu"))
    assert len(row) == len(on_gpu["HEAD"])
    assert all(float(cell) > 0 for cell in row[:-1])
    source = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=source)
    xt, sigma = x[:7] + torch.randn(7, 4, generator=source), torch.ones(7)
    means = on_gpu["materialised"](xt, sigma, x, 3)
    torch.testing.assert_close(means, posterior_mean(xt, 1.0, sigma, x).mean)
