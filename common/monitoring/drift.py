"""Whether a sketch comes from another distribution than its reference: a score for each feature, and a verdict.

The score is the population stability index, the sum of (p - q) ln(p / q) over the cells, where p and q are shares of
the sketch and of the reference (N. Siddiqi, "Credit Risk Scorecards", 2006: below 0.1 little change, above 0.25 a major
one). Few observations score high by chance: without any change n and m of them score about (1/n + 1/m) times a
chi-square with one degree of freedom fewer than cells (B. Yurdakul and J. Naranjo, "Statistical properties of the
population stability index", Journal of Risk Model Validation 14, 2020). So a feature is *stable* when it scores less
than `PSI_DRIFTED` and chance alone would hardly score as much; it has *drifted* when it scores that much and Pearson's
test of homogeneity rules chance out, which keeps to its level with small samples too, as the index does not; else the
observations do not say: *inconclusive*. "Hardly" and "rules out" mean one case in a thousand. The Jensen-Shannon
distance (J. Lin, 1991; base 2, 0 to 1) is told beside it: it needs no remedy for empty cells.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from common.ids import Digest
from common.monitoring.reference import Classes, Feature, Reference, Side, Values
from common.monitoring.sketch import FeatureCounts, Sketch

PSI_DRIFTED = 0.25
OBSERVATIONS_MIN = 30
"""With fewer observations on either side nothing is said."""
CHANCE_Z = 3.090232306167813
"""The normal distribution's 99.9 %."""

Verdict = Literal["drifted", "stable", "inconclusive"]
Kind = Literal["values", "classes", "top1"]
Shares = NDArray[np.float64]


class FeatureDrift(msgspec.Struct, frozen=True, kw_only=True):
    """One feature. `psi_by_chance` is about what the score stays below in 999 of 1000 cases without any change.

    `not_finite` and `outside` are shares of the elements of values: NaN or infinite, and smaller or larger than all of
    the reference.
    """

    tensor: str
    side: Side
    kind: Kind
    verdict: Verdict
    psi: float | None = None
    psi_by_chance: float | None = None
    js_distance: float | None = None
    not_finite: float = 0.0
    outside: float = 0.0
    low: float | None = None
    high: float | None = None


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """All features of `observations` requests against a reference of `reference_observations` samples."""

    reference: Digest
    verdict: Verdict
    observations: int
    reference_observations: int
    features: tuple[FeatureDrift, ...]


def drift_of(reference: Reference, sketch: Sketch) -> Drift:
    """The judgement. `ValueError` for a sketch whose cells are not the reference's."""
    known = (reference.observations, sketch.observations)
    features = tuple(
        _feature(feature, counts, *known) for feature, counts in zip(reference.features, sketch.features, strict=True)
    )
    return Drift(
        reference=sketch.reference,
        verdict=worst(feature.verdict for feature in features),
        observations=sketch.observations,
        reference_observations=reference.observations,
        features=features,
    )


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """`drifted` if one is, else `stable` if all are and there are any."""
    found = set(verdicts)
    if "drifted" in found:
        return "drifted"
    return "stable" if found == {"stable"} else "inconclusive"


def psi(p: Shares, q: Shares) -> float:
    """The population stability index of two rows of positive shares."""
    return float(((p - q) * np.log(p / q)).sum())


def js_distance(p: Shares, q: Shares) -> float:
    """The square root of the Jensen-Shannon divergence in bits: a metric, 0 for equal shares, 1 for disjoint ones."""
    middle = (p + q) / 2
    divergence = 0.0
    for one in (p, q):
        held = one > 0
        divergence += float((one[held] * np.log2(one[held] / middle[held])).sum()) / 2
    return math.sqrt(min(1.0, max(0.0, divergence)))


def psi_by_chance(cells: int, observed: int, expected: int) -> float:
    """What the index of two samples of one distribution stays below in about 999 of 1000 cases."""
    return _chi_square(cells - 1) * (1 / observed + 1 / expected)


def by_chance(p: Shares, q: Shares, observed: int, expected: int) -> bool:
    """Whether such shares of two samples of one distribution are not the rarest one in a thousand: Pearson's test of
    homogeneity, 1900.
    """
    pooled = (p * observed + q * expected) / (observed + expected)
    statistic = float(((p - q) ** 2 / pooled).sum()) / (1 / observed + 1 / expected)
    return statistic <= _chi_square(len(p) - 1)


def _chi_square(freedom: int) -> float:
    """The 99.9 % quantile: Wilson and Hilferty's approximation (1931), 3 % too large for one degree of freedom."""
    if not freedom:
        return 0.0
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + CHANCE_Z * math.sqrt(spread)) ** 3


def _feature(feature: Feature, found: FeatureCounts, expected: int, observed: int) -> FeatureDrift:
    counts, wanted = (np.asarray(one, np.float64) for one in (found.counts, feature.counts))
    if counts.shape != wanted.shape:
        raise ValueError(f"{len(counts)} counts for {len(wanted)} cells of {feature.tensor!r}")
    not_finite, outside = _odd(feature, found.counts)
    told = FeatureDrift(
        tensor=feature.tensor,
        side=feature.side,
        kind=_kind(feature),
        verdict="inconclusive",
        not_finite=not_finite,
        outside=outside,
        low=found.low,
        high=found.high,
    )
    if not counts.sum() or not wanted.sum() or min(observed, expected) < OBSERVATIONS_MIN:
        return told
    used = (counts + wanted) > 0
    p, q = counts[used] / counts.sum(), wanted[used] / wanted.sum()
    # Half an observation stands for none: an empty cell of a small sample must not make the score infinite.
    least = 0.5 / min(observed, expected)
    score = psi(np.maximum(p, least), np.maximum(q, least))
    chance = psi_by_chance(int(used.sum()), observed, expected)
    verdict: Verdict = "inconclusive"
    if score >= PSI_DRIFTED and not by_chance(p, q, observed, expected):
        verdict = "drifted"
    elif score < PSI_DRIFTED and chance < PSI_DRIFTED:
        verdict = "stable"
    return replace(told, psi=score, psi_by_chance=chance, js_distance=js_distance(p, q), verdict=verdict)


def _kind(feature: Feature) -> Kind:
    if isinstance(feature, Values):
        return "values"
    return "top1" if feature.top else "classes"


def _odd(feature: Feature, counts: Sequence[int]) -> tuple[float, float]:
    """The shares of what is not finite and of what lies outside the reference."""
    total = sum(counts)
    if isinstance(feature, Classes) or not total:
        return 0.0, 0.0
    return sum(counts[-2:]) / total, (counts[0] + counts[-3]) / total
