"""Ratios of two things timed in turn, so that whatever else the machine does slows both."""

import statistics
import time

import pytest


@pytest.fixture
def compare(benchmark):
    """Time ``ours`` and ``other`` alternately; store and print the ratio of their medians."""

    def run(ours, other, rounds, label):
        times = []

        def time_other():
            start = time.perf_counter()
            other()
            times.append(time.perf_counter() - start)

        benchmark.pedantic(ours, setup=time_other, rounds=rounds, warmup_rounds=1)
        times = times[-rounds:]
        other_median, our_median = statistics.median(times), benchmark.stats.stats.median
        benchmark.extra_info |= {"other_median_s": other_median, "ratio": our_median / other_median}
        print(f"\n{label}: {1e3 * our_median:.1f} ms and {1e3 * other_median:.1f} ms")
        return our_median, other_median

    return run
