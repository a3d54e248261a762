"""Ratios of two things timed in turn, so that whatever else the machine does slows both."""

import pydoc
import statistics

import pytest


@pytest.fixture
def compare(benchmark, request):
    """Time ``ours`` and ``other`` alternately; store and print the ratio of their medians.

    Both are timed by the timer of ``--benchmark-timer``: CPU time on a machine that is busy.
    """
    timer = pydoc.locate(request.config.getoption("benchmark_timer"))

    def run(ours, other, rounds, label):
        times = []

        def time_other():
            start = timer()
            other()
            times.append(timer() - start)

        benchmark.pedantic(ours, setup=time_other, rounds=rounds, warmup_rounds=1)
        times = times[-rounds:]
        other_median, our_median = statistics.median(times), benchmark.stats.stats.median
        benchmark.extra_info |= {"other_median_s": other_median, "ratio": our_median / other_median}
        print(f"\n{label}: {1e3 * our_median:.1f} ms and {1e3 * other_median:.1f} ms")
        return our_median, other_median

    return run
