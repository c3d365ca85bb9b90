"""Whether and how the requests to one release run together, as learned from those that came.

A release whose tensors all have an open first axis may treat its rows one by one, or may not. The first requests that
could run together are therefore run alone, answered, and then run once more together: when that gave the same answers
`TRIALS` times, the release is batched from then on, and when it did not once, never. How many rows to run together is
what a cost curve for each shape of rows has learned.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Final

from common.artifact import TensorSpec
from common.artifact.tensors import Array
from edge_agent.inference.scheduling import ROWS_MAX, CostCurve, has_rows, row_count

TRIALS: Final = 3
TRIAL_ROWS_MAX: Final = 4
SHAPES_MAX: Final = 64
"""Shapes of rows for which a curve is kept; the one that was used longest ago is forgotten."""
BATCH_BYTES_MAX: Final = 16 * 1024 * 1024
"""Inputs of one batch: what the engine needs beside them is in proportion."""


class Batching:
    """What is known about batches of one release. Safe for threads."""

    def __init__(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, row_wise: bool = True
    ) -> None:
        self._lock = threading.Lock()
        self._possible = row_wise and has_rows(inputs, outputs)
        self._trials = 0
        self._curves: OrderedDict[Hashable, CostCurve] = OrderedDict()

    @property
    def proven(self) -> bool:
        """Whether rows were seen to be independent."""
        return self._possible and self._trials >= TRIALS

    def shape_of(self, feeds: Mapping[str, Array]) -> Hashable:
        """What inputs have in common with those that cost as much for each row, and that they may be joined with."""
        first = 1 if self._possible else 0
        return tuple([(name, feeds[name].shape[first:]) for name in sorted(feeds)])

    def rows_of(self, feeds: Mapping[str, Array]) -> int | None:
        """How many rows `feeds` has; None when it must run alone."""
        return row_count(feeds) or None if self._possible else None

    def tried(self, *, alike: bool) -> None:
        """A batch gave the same answers as its requests alone, or did not."""
        with self._lock:
            self._trials += 1
            self._possible &= alike

    def next_rows(self, shape: Hashable, waiting: int, size: int) -> int:
        """How many of `waiting` rows to run together, of which each has about `size` bytes."""
        if not self.proven:
            return min(waiting, TRIAL_ROWS_MAX)
        with self._lock:
            chosen = self._curve(shape).next_rows(waiting)
        return max(1, min(chosen, BATCH_BYTES_MAX // max(1, size)))

    def observe(self, shape: Hashable, rows: int, seconds: float) -> None:
        """A batch took `seconds` in the engine."""
        with self._lock:
            self._curve(shape).observe(rows, seconds)

    def seconds(self, shape: Hashable, rows: int) -> float | None:
        """About how long `rows` take; None when nothing is known of their shape."""
        with self._lock:
            curve = self._curves.get(shape)
            return curve.seconds(rows) if curve else None

    def _curve(self, shape: Hashable) -> CostCurve:
        curve = self._curves.get(shape)
        if curve is None:
            curve = self._curves[shape] = CostCurve(ROWS_MAX)
            if len(self._curves) > SHAPES_MAX:
                self._curves.popitem(last=False)
        else:
            self._curves.move_to_end(shape)
        return curve
