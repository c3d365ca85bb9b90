"""Quantiles of a histogram stay within the bucket that holds them."""

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from common.wire import LATENCY_BOUNDS_S
from common.wire.histogram import quantile_s

LATENCIES = st.lists(st.floats(0.00001, 9.9), min_size=1, max_size=200)


def histogram(latencies: list[float]) -> list[int]:
    counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
    for latency in latencies:
        counts[bisect_left(LATENCY_BOUNDS_S, latency)] += 1
    return counts


@given(latencies=LATENCIES, share=st.floats(0.01, 1.0))
def test_an_estimate_is_in_the_bucket_of_the_true_quantile(latencies: list[float], share: float) -> None:
    estimate = quantile_s(histogram(latencies), share)
    rank = share * len(latencies)
    true = next(value for number, value in enumerate(sorted(latencies), 1) if number >= rank)
    bounds = (0.0, *LATENCY_BOUNDS_S)
    bucket = bisect_left(LATENCY_BOUNDS_S, true)
    assert estimate is not None
    assert bounds[bucket] <= estimate <= bounds[bucket + 1] * (1 + 1e-9)


@given(latencies=LATENCIES)
def test_quantiles_never_cross(latencies: list[float]) -> None:
    counts = histogram(latencies)
    assert (quantile_s(counts, 0.5) or 0) <= (quantile_s(counts, 0.99) or 0)


def test_nothing_has_no_quantile_and_what_is_slower_than_all_bounds_is_at_the_last() -> None:
    assert quantile_s([0] * 17, 0.5) is None
    assert quantile_s([0] * 16 + [3], 0.5) == LATENCY_BOUNDS_S[-1]
