"""Which numbers of rows a new release is warmed on: those that the release before it really ran.

An engine plans memory for each shape at its first run, so the first batch after a switch would pay for that. Only
models whose rows stand in an open first axis (and whose steps, if any, take rows one by one) have batches; the example
of one row has been run by then, and a batch that fails says nothing about the release, for batches are taken apart when
they fail.

    >>> sizes_in_use([Runs(1, 10, 0.1), Runs(8, 100, 2.0), Runs(32, 1, 0.1)], row_bytes=1024)
    (8,)
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from common.artifact import TensorSpec
from common.artifact.tensors import Array
from common.errors import InvalidInput, Unavailable
from edge_agent.inference.engine import EngineFailure
from edge_agent.inference.loaded import Runs
from edge_agent.inference.scheduling import BATCH_BYTES_MAX, has_rows
from edge_agent.inference.tensors import bytes_of
from edge_agent.inference.trial import Runnable

SIZES_MAX = 4
SHARE = 0.95
"""The sizes that together carried so much of the rows, the busiest first, are enough."""


def sizes_in_use(runs: Iterable[Runs], *, row_bytes: int, bytes_max: int = BATCH_BYTES_MAX) -> tuple[int, ...]:
    """Numbers of rows above one, the busiest first, of which a batch's inputs (`row_bytes` a row) take at most
    `bytes_max`.
    """
    busiest = sorted(runs, key=lambda run: run.rows * run.count, reverse=True)
    enough = SHARE * sum(run.rows * run.count for run in busiest)
    chosen: list[int] = []
    carried = 0
    for run in busiest:
        if carried >= enough or len(chosen) == SIZES_MAX:
            break
        carried += run.rows * run.count
        if run.rows > 1 and run.rows * row_bytes <= bytes_max:
            chosen.append(run.rows)
    return tuple(chosen)


def warm(
    release: Runnable,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    example: Mapping[str, Array],
    runs: Sequence[Runs],
    *,
    bytes_max: int = BATCH_BYTES_MAX,
) -> int:
    """Run `release` once on each size that `runs` show to be in use, with the first row of `example` again and again;
    how many there were. Never raises for a batch.
    """
    if not has_rows(inputs, outputs):
        return 0
    row = {name: array[:1] for name, array in example.items()}
    sizes = sizes_in_use(runs, row_bytes=bytes_of(row.values()), bytes_max=bytes_max)
    for rows in sizes:
        with contextlib.suppress(EngineFailure, InvalidInput, Unavailable):
            release.run(_repeated(row, rows), [spec.name for spec in outputs])
    return len(sizes)


def _repeated(row: Mapping[str, Array], rows: int) -> dict[str, Array]:
    return {name: np.repeat(array, rows, axis=0) for name, array in row.items()}
