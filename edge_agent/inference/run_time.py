"""How long a run of a release takes on this device: a number that can be compared with other variants and devices.

It is the median of a few runs of the input on which the release was warmed up, one after another, on a thread
of the usual priority: the lowest, at which releases are loaded, would measure what else the device does. The release
does not serve yet. Between two runs there is a pause as long as the last run, so that at most half of a core is taken
from requests. Runs and seconds are limited; of a release that takes longer than that for one run, one run is what is
measured.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Final, Protocol

from common.artifact.tensors import Array
from common.errors import FerryError
from edge_agent.inference.timelimit import stopped_after

RUNS: Final = 9
FEW_RUNS: Final = 3
"""While nothing answers in the place of the release."""
MEASURE_S_MAX: Final = 2.0
"""No further run begins after this."""
RUN_S_MAX: Final = 30.0
"""A run is stopped then; nothing is measured."""


class Release(Protocol):
    """What is measured: `edge_agent.inference.loaded.Loaded`."""

    example: Mapping[str, Array]
    output_names: tuple[str, ...]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]: ...
    def stop(self, thread: int) -> None: ...
    def pin(self) -> bool: ...
    def unpin(self) -> None: ...


def median_run_s(
    release: Release, elapsed: Callable[[], float], runs: int = RUNS, sleep: Callable[[float], None] = time.sleep
) -> float | None:
    """Seconds; None when the release was given up meanwhile or a run failed, which is no verdict on it.

    `elapsed` reads a steady clock, in seconds. The first run, on a thread that is new to the release, does not count.
    """
    if not release.pin():
        return None
    try:
        seconds = list(_seconds(release, elapsed, runs, sleep))
    except FerryError:
        return None
    finally:
        release.unpin()
    return median(seconds)


def _seconds(
    release: Release, elapsed: Callable[[], float], runs: int, sleep: Callable[[float], None]
) -> Iterator[float]:
    began = elapsed()
    for number in range(runs + 1):
        with stopped_after(RUN_S_MAX, release.stop):  # which takes longer than the run of a small model
            started_at = elapsed()
            release.run(release.example, release.output_names)
            run_s = elapsed() - started_at
        late = elapsed() - began > MEASURE_S_MAX
        if number or late:
            yield run_s
        if late or number == runs:
            break
        sleep(run_s)
