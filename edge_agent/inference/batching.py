"""Whether and how the requests to one release run together, as learned from those that came.

A release whose tensors all have an open first axis may treat its rows one by one, or may not. The first requests that
could run together are therefore run alone, answered, and then run once more together: when that gave the same answers
`TRIALS` times, the release is batched from then on, and when it did not once, never. How many rows to run together is
what a cost curve for each shape of rows has learned. Requests of different lengths are a matter of their own
(`edge_agent.inference.lengths`); they have a curve for each class of lengths, which is fed with what padded batches
took, so that padding is used only where it pays.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Final, NamedTuple

from common.artifact import TensorSpec
from common.artifact.serving import Padding
from common.artifact.tensors import Array
from edge_agent.inference.lengths import Lengths
from edge_agent.inference.scheduling import ROWS_MAX, CostCurve, has_rows, length_class, row_count

TRIALS: Final = 3
TRIAL_ROWS_MAX: Final = 4
SHAPES_MAX: Final = 64
"""Shapes of rows for which a curve is kept; the one that was used longest ago is forgotten."""


class Kind(NamedTuple):
    """What requests have in common that may be joined, and the length up to which they are padded (0: they are not)."""

    shape: Hashable
    length: int = 0

    @property
    def classed(self) -> Hashable:
        """What requests have in common that cost as much for each row."""
        return self.shape, length_class(self.length)


class Batching:
    """What is known about batches of one release. Safe for threads."""

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        padding: Mapping[str, Padding] | None = None,
        *,
        row_wise: bool = True,
    ) -> None:
        self._lock = threading.Lock()
        self._possible = row_wise and has_rows(inputs, outputs)
        self._trials = 0
        self._answer_bytes = 0
        self.lengths = Lengths(padding or {}, inputs, batched=self._possible)
        self._same = None if self.lengths.padder else self._same_kind(inputs)
        self._curves: OrderedDict[Hashable, CostCurve] = OrderedDict()

    @property
    def possible(self) -> bool:
        """Whether requests may run together, as far as is known."""
        return self._possible

    @property
    def proven(self) -> bool:
        """Whether rows were seen to be independent."""
        return self._possible and self._trials >= TRIALS

    def kind_of(self, feeds: Mapping[str, Array]) -> Kind:
        """What `feeds` have in common with those that they may be joined with."""
        return self._same or Kind(self.shape_of(feeds), self.length_of(feeds))

    def shape_of(self, feeds: Mapping[str, Array]) -> Hashable:
        """What inputs have in common with those that cost as much for each row, and that they may be joined with."""
        if self.lengths.padder and self.length_of(feeds):
            return self.lengths.padder.shape_of(feeds)
        first = 1 if self._possible else 0
        return tuple([(name, feeds[name].shape[first:]) for name in sorted(feeds)])

    def length_of(self, feeds: Mapping[str, Array]) -> int:
        """The length up to which `feeds` may differ from others that it is joined with; 0 if it may not."""
        lengths = self.lengths
        return lengths.padder.length_of(feeds) if lengths.padder and lengths.used and self._possible else 0

    def rows_of(self, feeds: Mapping[str, Array]) -> int | None:
        """How many rows `feeds` has; None when it must run alone."""
        return row_count(feeds) or None if self._possible else None

    def tried(self, *, alike: bool) -> None:
        """A batch gave the same answers as its requests alone, or did not."""
        with self._lock:
            self._trials += 1
            self._possible &= alike

    def next_rows(self, kind: Kind, waiting: int, size: int, bytes_max: int) -> int:
        """How many of `waiting` rows to run together, of which each has about `size` bytes, so that they and their
        answers take at most `bytes_max`.
        """
        if self.proven:
            with self._lock:
                chosen = self._curve(kind).next_rows(waiting)
        else:
            chosen = min(waiting, TRIAL_ROWS_MAX)
        return max(1, min(chosen, bytes_max // max(1, size + self._answer_bytes)))

    def observe(self, kind: Kind, rows: int, seconds: float, answer_bytes: int = 0) -> None:
        """A batch took `seconds` in the engine, and its answers `answer_bytes`."""
        with self._lock:
            self._answer_bytes = max(self._answer_bytes, answer_bytes // rows)
            self._curve(kind).observe(rows, seconds)

    def seconds(self, kind: Kind, rows: int) -> float | None:
        """About how long `rows` take; None when nothing is known of their kind."""
        with self._lock:
            curve = self._curves.get(kind.classed)
            return curve.seconds(rows) if curve else None

    def _same_kind(self, inputs: tuple[TensorSpec, ...]) -> Kind | None:
        """What all requests are of, if every axis but that of the rows has one length."""
        first = 1 if self._possible else 0
        shapes = tuple(sorted((spec.name, spec.shape[first:]) for spec in inputs))
        return None if any(-1 in shape for _, shape in shapes) else Kind(shapes)

    def _curve(self, kind: Kind) -> CostCurve:
        shape = kind.classed
        curve = self._curves.get(shape)
        if curve is None:
            curve = self._curves[shape] = CostCurve(ROWS_MAX)
            if len(self._curves) > SHAPES_MAX:
                self._curves.popitem(last=False)
        else:
            self._curves.move_to_end(shape)
        return curve
