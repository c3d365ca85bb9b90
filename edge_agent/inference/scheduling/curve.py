"""What a batch costs on this device, learned from the batches that ran, and how many rows the next one should have.

Whether rows are cheaper together depends on model and machine: of five real models two lost beyond four rows, two
gained nothing, and one was 2.3 times as fast at 32. So nothing is assumed. A curve begins with single rows and climbs,
size by size, as long as a row gets cheaper and enough requests wait for the next size; now and then it looks at the
sizes beside the best again. It never chooses a size that was seen to cost more for each row than a single one does.

A curve belongs to one release and one shape of rows.

    >>> curve = CostCurve()
    >>> for rows, seconds in ((1, 0.010), (2, 0.012), (4, 0.030)):
    ...     for _ in range(OBSERVATIONS_MIN):
    ...         curve.observe(rows, seconds)
    >>> curve.best
    2
"""

from bisect import bisect_right
from collections import deque
from statistics import median
from typing import Final

SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
"""Rows that a curve knows the cost of; a batch in between counts as the next smaller one."""
ROWS_MAX: Final = SIZES[-1]
OBSERVATIONS_MAX: Final = 9
"""Newest batches of each size whose median counts: so one that was disturbed does not."""
OBSERVATIONS_MIN: Final = 3
JUDGE_AFTER: Final = 4
"""Batches of a size, once its cost is known, between two looks at what is best: each request would pay for it."""
GAIN_MIN: Final = 0.03
"""Of the cost of a row: a larger batch makes callers wait for each other and must be worth that."""
LOSSES_MAX: Final = 2
"""Sizes in a row that were no better end the climb."""
LOOK_AGAIN_AFTER: Final = 64
"""Choices between two looks at a size beside the best."""


class CostCurve:
    """Seconds for each batch size, up to `rows_max` rows; see the module's text. Not safe for threads."""

    def __init__(self, rows_max: int = ROWS_MAX) -> None:
        self._sizes = [size for size in SIZES if size <= max(1, rows_max)]
        self._seconds = {size: deque[float](maxlen=OBSERVATIONS_MAX) for size in self._sizes}
        self._since = dict.fromkeys(self._sizes, 0)
        self._each: dict[int, float] = {}
        self._best = 1
        self._climb: int | None = 1
        self._choices = 0

    @property
    def best(self) -> int:
        """The size whose rows are cheapest, as far as is known."""
        return self._best

    def observe(self, rows: int, seconds: float) -> None:
        """A batch of `rows` took `seconds` in the engine."""
        size = self._sizes[max(0, bisect_right(self._sizes, rows) - 1)]
        seen = self._seconds[size]
        seen.append(seconds / rows)
        self._since[size] += 1
        if len(seen) >= OBSERVATIONS_MIN and self._since[size] >= (1 if len(seen) < OBSERVATIONS_MAX else JUDGE_AFTER):
            self._since[size] = 0
            self._each[size] = median(seen)
            self._best, self._climb = self._judged()

    def seconds(self, rows: int) -> float | None:
        """About how long `rows` take, in batches of the best size; None before anything was observed."""
        known = self._each.get(self._best) or next((median(seen) for seen in self._seconds.values() if seen), None)
        return None if known is None else known * rows

    def next_rows(self, waiting: int) -> int:
        """How many of `waiting` rows (at least one) to run together now."""
        limit = min(waiting, self._sizes[-1])
        if self._climb is not None and self._climb <= limit:
            return self._climb
        self._choices += 1
        beside = [size for size in (self._best // 2, self._best * 2) if size in self._each and size <= limit]
        if beside and self._choices % LOOK_AGAIN_AFTER == 0:
            return beside[self._choices // LOOK_AGAIN_AFTER % len(beside)]
        return min(self._best, limit)

    def _judged(self) -> tuple[int, int | None]:
        """The best of the known sizes, and the next unknown one to try; None when the climb has ended."""
        best, losses = 1, 0
        for size in self._sizes:
            if size not in self._each:
                return best, size
            if size == 1 or self._each[size] < self._each[best] * (1 - GAIN_MIN):
                best, losses = size, 0
            else:
                losses += 1
            if losses == LOSSES_MAX:
                break
        return best, None
