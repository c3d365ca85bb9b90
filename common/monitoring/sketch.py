"""A sketch: what was counted of some requests, in the cells of a reference. Only counts, so sketches add up.

`observations` are requests. The elements of one request are no independent draws, so it is requests that say how much a
sketch is worth, however many elements were counted of each.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from common.ids import Digest

FEATURES_MAX = 32
CELLS_MAX = 64

Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Observations = Annotated[int, Meta(ge=1, le=2**53 - 1)]


class FeatureCounts(msgspec.Struct, frozen=True, omit_defaults=True):
    """Elements in each cell of one feature; `low` and `high` are the smallest and the largest finite one of them, for a
    feature that counts values.
    """

    counts: Annotated[tuple[Count, ...], Meta(max_length=CELLS_MAX)]
    low: float | None = None
    high: float | None = None


class Sketch(msgspec.Struct, frozen=True, kw_only=True):
    """`observations` requests in the cells of the reference whose file has that digest, feature by feature."""

    reference: Annotated[Digest, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
    observations: Observations
    features: Annotated[tuple[FeatureCounts, ...], Meta(min_length=1, max_length=FEATURES_MAX)]


def merged(one: Sketch, other: Sketch) -> Sketch:
    """Both together; it does not matter in which order. `ValueError` for sketches that were counted in other cells."""
    if one.reference != other.reference or len(one.features) != len(other.features):
        raise ValueError("these were counted by different references")
    return Sketch(
        reference=one.reference,
        observations=one.observations + other.observations,
        features=tuple(map(_both, one.features, other.features)),
    )


def _both(one: FeatureCounts, other: FeatureCounts) -> FeatureCounts:
    counts = tuple(mine + theirs for mine, theirs in zip(one.counts, other.counts, strict=True))
    lows = [low for low in (one.low, other.low) if low is not None]
    highs = [high for high in (one.high, other.high) if high is not None]
    return FeatureCounts(counts, min(lows, default=None), max(highs, default=None))
