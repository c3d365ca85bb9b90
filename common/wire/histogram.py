"""What the buckets of a latency histogram say; the bounds are `LATENCY_BOUNDS_S`."""

from collections.abc import Sequence

from common.wire.messages import LATENCY_BOUNDS_S


def quantile_s(counts: Sequence[int], share: float) -> float | None:
    """The latency in seconds that `share` (0 to 1) of the answers did not exceed; None of no answers.

    Interpolated linearly within the bucket, as Prometheus' `histogram_quantile`; what is slower than the last bound is
    taken to be at it, so an estimate in the last bucket is a lower bound.
    """
    rank = share * sum(counts)
    if not rank:
        return None
    below, lower = 0, 0.0
    for count, upper in zip(counts, LATENCY_BOUNDS_S, strict=False):
        if below + count >= rank:
            return lower + (upper - lower) * (rank - below) / count
        below, lower = below + count, upper
    return LATENCY_BOUNDS_S[-1]
