"""From the tensors of one request to counts, in two halves.

`pick` is for the path of the request: it copies a bounded number of elements, spread over the whole tensor, and nothing
else. `count` puts them into cells, whenever there is time. Which elements are picked depends on nothing but the number
of them, so a reference and a device pick alike.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.artifact.tensors import Array
from common.ids import Digest
from common.monitoring.reference import Classes, Feature, Reference, Values
from common.monitoring.sketch import FeatureCounts, Sketch, merged

ELEMENTS_MAX = 256
"""Elements that are picked of a tensor."""
ROWS_MAX = 16
"""Rows whose largest element is looked for."""
TOP_ELEMENTS_MAX = 64 * 1024
"""A tensor with more elements in those rows is not searched for the largest ones."""
GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio, modulo 1, are spread evenly and keep step with no axis of a tensor."""


class Sampled(NamedTuple):
    """The picked elements of one request, feature by feature; `digest` names the reference."""

    reference: Reference
    digest: str
    picked: tuple[Array, ...]


def pick(feature: Feature, array: Array) -> Array:
    """A copy of the elements of `array` that are counted; for `top`, the places of the largest ones of its first rows.

    Nothing is picked of an empty tensor.
    """
    if isinstance(feature, Classes) and feature.top:
        return _tops(array[:ROWS_MAX]) if array.ndim == 2 else np.empty(0, np.intp)
    if array.size <= ELEMENTS_MAX:
        return array.flatten()
    places = _places(array.size)
    return array.reshape(-1)[places] if array.flags.c_contiguous else array.flat[places]


def count(feature: Feature, picked: Array) -> FeatureCounts:
    """What was picked, in the cells of the feature: every element is in exactly one."""
    match feature:
        case Values(edges=edges):
            return _count_values(np.asarray(edges), picked.astype(np.float64))
        case Classes(classes=classes):
            return _count_classes(np.asarray(classes), picked)


def sketch_of(samples: Iterable[Sampled]) -> Sketch | None:
    """All that was sampled by one reference, counted; None of nothing."""
    total: Sketch | None = None
    for sample in samples:
        features = tuple(map(count, sample.reference.features, sample.picked))
        sketch = Sketch(reference=Digest(sample.digest), observations=1, features=features)
        total = sketch if total is None else merged(total, sketch)
    return total


def _tops(rows: Array) -> NDArray[np.intp]:
    searched = rows.shape[1] and rows.size <= TOP_ELEMENTS_MAX
    return np.argmax(rows, axis=1) if searched else np.empty(0, np.intp)


def _count_values(edges: NDArray[np.float64], values: NDArray[np.float64]) -> FeatureCounts:
    finite = values[np.isfinite(values)]
    cells = np.bincount(np.searchsorted(edges, finite, side="left"), minlength=len(edges) + 1)
    not_numbers, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (None, None)
    return FeatureCounts((*map(int, cells), not_numbers, infinite), low, high)


def _count_classes(classes: Array, values: Array) -> FeatureCounts:
    found = values.astype(np.int64) if values.dtype.kind == "b" else values
    places = np.minimum(np.searchsorted(classes, found), len(classes) - 1)
    cells = np.bincount(np.where(classes[places] == found, places, len(classes)), minlength=len(classes) + 1)
    return FeatureCounts(tuple(map(int, cells)))


@lru_cache(maxsize=64)
def _places(size: int) -> NDArray[np.intp]:
    spread = np.arange(ELEMENTS_MAX) * GOLDEN % 1.0
    return np.minimum((spread * size).astype(np.intp), size - 1)
