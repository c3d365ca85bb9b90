"""Requests as rows of one batch: which models have rows, joining inputs, taking outputs apart, comparing answers. Pure.

A model has rows if the first axis of every input and output is open. That it treats them independently is more than its
signature can say (a model may sort, normalise or count over the first axis), so it is tried on real requests before it
is believed: `agree` compares what came out together with what came out alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from common.artifact import TensorSpec
from common.artifact.tensors import Array

RELATIVE_MAX: Final = 1e-3
"""Deviation of a float from what came out alone: kernels for other shapes add in another order."""
ABSOLUTE_MAX: Final = 1e-4
"""The same as a share of the largest magnitude in the output, for values near zero."""
HALF_FACTOR: Final = 8
"""By how much more 16-bit floats may deviate."""


def has_rows(inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> bool:
    """Whether the first axis of all tensors is open."""
    specs = [*inputs, *outputs]
    return bool(specs) and all(spec.shape and spec.shape[0] == -1 for spec in specs)


def row_count(feeds: Mapping[str, Array]) -> int | None:
    """The length of the first axis that all inputs share; None if they do not."""
    lengths = {len(array) for array in feeds.values()}
    return lengths.pop() if len(lengths) == 1 else None


def join(requests: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The rows of all requests, which have the same inputs in the same shapes but for the first axis."""
    return {name: np.concatenate([feeds[name] for feeds in requests]) for name in requests[0]}


def split(outputs: Mapping[str, Array], rows: Sequence[int]) -> list[dict[str, Array]] | None:
    """The outputs of each request, which brought `rows`; None when an output does not have a row for each of theirs."""
    ends = np.cumsum(rows).tolist()
    if any(array.ndim == 0 or len(array) != ends[-1] for array in outputs.values()):
        return None
    begins = [0, *ends]
    return [
        {name: array[begin:end] for name, array in outputs.items()} for begin, end in zip(begins, ends, strict=False)
    ]


def agree(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Whether two answers to the same request are the same, but for the rounding of floats."""
    return one.keys() == other.keys() and all(_close(one[name], other[name]) for name in one)


def _close(one: Array, other: Array) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if one.dtype.kind != "f":
        return bool((one == other).all())
    factor = HALF_FACTOR if one.dtype.itemsize < 4 else 1
    scale = float(np.abs(other).max(initial=0))
    return np.allclose(one, other, rtol=factor * RELATIVE_MAX, atol=factor * ABSOLUTE_MAX * scale, equal_nan=True)
