"""The reference: how the tensors of a release were distributed in its publisher's samples, as counts in cells.

A *feature* is one thing that is counted of one tensor. `Values`: its elements, in bins that each hold a tenth of the
reference's elements, with a cell below and one above all of them, and one each for NaN and for infinities, so that
every number there is falls into exactly one cell. `Classes`: its elements, where there are few different ones, or
(`top`) the places of the largest elements of its rows, which is the class that a classifier chose; the last cell is for
all others. Text is not counted. The file is JSON; equal references encode equally.
"""

from itertools import pairwise
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from common.artifact import TensorSpec
from common.artifact.tensors import DTYPES
from common.errors import IntegrityFailure, InvalidInput
from common.monitoring.sketch import FEATURES_MAX, Count, Observations, Sketch

REFERENCE_FILE = "reference.json"
"""The name of the reference among a variant's files."""
REFERENCE_BYTES_MAX = 128 * 1024
EDGES_MAX = 32
CLASSES_MAX = 32
"""Classes with a cell of their own."""
NAME_CHARS_MAX = 256

Side = Literal["input", "output"]
Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]


class Values(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="values"):
    """Elements by size. Cell i holds what is above `edges[i - 1]` and up to `edges[i]`; then come those above the last
    edge, NaN, and infinities.
    """

    tensor: Name
    side: Side
    edges: Annotated[tuple[float, ...], Meta(min_length=1, max_length=EDGES_MAX)]
    counts: tuple[Count, ...]

    def __post_init__(self) -> None:
        if not all(np.isfinite(self.edges)) or any(lower >= upper for lower, upper in pairwise(self.edges)):
            raise ValueError("the edges do not grow")
        _check_counts(self.counts, self.cells)

    @property
    def cells(self) -> int:
        """How many counts belong to it."""
        return len(self.edges) + 3


class Classes(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="classes"):
    """Elements by value or, with `top`, the places of the largest ones along the last axis: a cell for each of
    `classes` (they grow), one for all others.
    """

    tensor: Name
    side: Side
    classes: Annotated[tuple[int, ...], Meta(min_length=1, max_length=CLASSES_MAX)]
    counts: tuple[Count, ...]
    top: bool = False

    def __post_init__(self) -> None:
        if any(lower >= upper for lower, upper in pairwise(self.classes)):
            raise ValueError("the classes do not grow")
        _check_counts(self.counts, self.cells)

    @property
    def cells(self) -> int:
        """How many counts belong to it."""
        return len(self.classes) + 1


Feature = Values | Classes


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """`observations` samples, counted by `features`."""

    observations: Observations
    features: Annotated[tuple[Feature, ...], Meta(min_length=1, max_length=FEATURES_MAX)]
    format: Annotated[int, Meta(ge=1, le=1)] = 1


def encode_reference(reference: Reference) -> bytes:
    """The reference as bytes."""
    return msgspec.json.encode(reference, order="sorted")


def decode_reference(data: bytes) -> Reference:
    """The reference in `data`; `IntegrityFailure` names what is wrong with other bytes."""
    if len(data) > REFERENCE_BYTES_MAX:
        raise IntegrityFailure(f"this is no reference: {len(data)} bytes, the limit is {REFERENCE_BYTES_MAX}")
    try:
        return msgspec.json.decode(data, type=Reference)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityFailure(f"this is no reference: {error}") from error


def check_reference(reference: Reference, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Raise `InvalidInput` unless every feature is of a tensor that the model has and that can be counted so."""
    specs = {("input", spec.name): spec for spec in inputs} | {("output", spec.name): spec for spec in outputs}
    for number, feature in enumerate(reference.features):
        field = f"features[{number}]"
        spec = specs.get((feature.side, feature.tensor))
        if spec is None:
            raise InvalidInput(f"the model has no {feature.side} {feature.tensor[:80]!r}", field=field)
        if DTYPES.get(spec.datatype, DTYPES["BYTES"]).kind == "O":
            raise InvalidInput(f"{spec.datatype} is not counted", field=field, fix="leave it out")
        if isinstance(feature, Classes) and feature.top and len(spec.shape) != 2:
            raise InvalidInput("a largest element is looked for in [rows, classes] only", field=field)


def is_counted_by(reference: Reference, sketch: Sketch) -> bool:
    """Whether the sketch has a count for each cell of the reference."""
    cells = [feature.cells for feature in reference.features]
    return [len(feature.counts) for feature in sketch.features] == cells


def _check_counts(counts: tuple[int, ...], cells: int) -> None:
    if len(counts) != cells:
        raise ValueError(f"{len(counts)} counts for {cells} cells")
