"""Making a reference from the publisher's samples: their inputs, and what the model answered to them."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from common.artifact import TensorSpec
from common.artifact.tensors import DTYPES, Array
from common.errors import InvalidInput
from common.monitoring.reference import CLASSES_MAX, Classes, Feature, Reference, Side, Values
from common.monitoring.sketch import FEATURES_MAX, FeatureCounts
from common.monitoring.sketching import count, pick

BINS = 10
CLASS_SHARE_MIN = 0.02
"""Rarer classes share a cell, unless there are fewer than `BINS`: each cell more takes more observations to judge."""
CLASS_AXIS_MAX = 4096
"""An output [rows, n] with more elements in a row is not taken for scores of classes."""

Tensors = Mapping[str, Array]


def make_reference(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], samples: Sequence[tuple[Tensors, Tensors]]
) -> Reference:
    """The reference of `samples`, each the inputs and the outputs of one request, by tensor.

    Outputs come first when there are more than `FEATURES_MAX` features. `InvalidInput` when nothing can be counted.
    """
    features: list[Feature] = []
    sides: tuple[tuple[Side, tuple[TensorSpec, ...], int], ...] = (("output", outputs, 1), ("input", inputs, 0))
    for side, specs, place in sides:
        for spec in specs:
            features += _features(spec, side, [sample[place][spec.name] for sample in samples])
    if not features:
        fix = "give samples of numbers; text is not counted"
        raise InvalidInput("there is nothing to count", field="reference", fix=fix)
    return Reference(observations=len(samples), features=tuple(features[:FEATURES_MAX]))


def _features(spec: TensorSpec, side: Side, arrays: Sequence[Array]) -> list[Feature]:
    kind = DTYPES[spec.datatype].kind
    if kind == "O":
        return []
    found: list[Feature] = []
    if side == "output" and kind == "f" and len(spec.shape) == 2 and 2 <= spec.shape[1] <= CLASS_AXIS_MAX:
        found += _classes(spec, side, arrays, top=True)
    whole = Values(tensor=spec.name, side=side, edges=(0.0,), counts=(0,) * 4)  # only says that elements are picked
    elements = np.concatenate([pick(whole, array) for array in arrays])
    if kind != "f" and 0 < np.unique(elements).size <= CLASSES_MAX:
        return found + _classes(spec, side, arrays, top=False)
    edges = _edges(elements.astype(np.float64))
    return found + ([_counted_values(spec, side, edges, arrays)] if edges else [])


def _classes(spec: TensorSpec, side: Side, arrays: Sequence[Array], *, top: bool) -> list[Feature]:
    blank = Classes(tensor=spec.name, side=side, classes=(0,), counts=(0, 0), top=top)
    elements = np.concatenate([pick(blank, array) for array in arrays]).astype(np.int64)
    values, numbers = np.unique(elements, return_counts=True)
    if not values.size:
        return []
    frequent = np.argsort(-numbers, kind="stable")
    known = max(int((numbers >= CLASS_SHARE_MIN * elements.size).sum()), min(BINS, len(values)))
    usual = np.sort(values[frequent[: min(known, CLASSES_MAX)]])
    classes = tuple(map(int, usual))
    empty = replace(blank, classes=classes, counts=(0,) * (len(classes) + 1))
    return [replace(empty, counts=_total(empty, arrays))]


def _counted_values(spec: TensorSpec, side: Side, edges: tuple[float, ...], arrays: Sequence[Array]) -> Values:
    empty = Values(tensor=spec.name, side=side, edges=edges, counts=(0,) * (len(edges) + 3))
    return replace(empty, counts=_total(empty, arrays))


def _edges(elements: NDArray[np.float64]) -> tuple[float, ...]:
    """A tenth of the elements lies between two edges, as far as ties allow; nothing lies outside all of them."""
    finite = elements[np.isfinite(elements)]
    if not finite.size:
        return ()
    inner = np.quantile(finite, np.arange(1, BINS) / BINS, method="inverted_cdf")
    below = np.nextafter(finite.min(), -np.inf)
    edges = np.unique([below, *inner, finite.max()])
    return tuple(map(float, edges[np.isfinite(edges)]))


def _total(feature: Feature, arrays: Iterable[Array]) -> tuple[int, ...]:
    counted: list[FeatureCounts] = [count(feature, pick(feature, array)) for array in arrays]
    return tuple(map(sum, zip(*(one.counts for one in counted), strict=True)))
