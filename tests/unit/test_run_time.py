"""A release's run time is the median of few runs, whose number and seconds are limited, and holds up nobody."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from edge_agent.inference.engine import EngineFailure
from edge_agent.inference.run_time import FEW_RUNS, MEASURE_S_MAX, RUNS, median_run_s

FEEDS = {"x": np.zeros((1, 2), np.float32)}


class Clocked:
    """A release whose runs take the given seconds on a clock of its own, the last ones again and again."""

    example: Mapping[str, Any] = FEEDS
    output_names: tuple[str, ...] = ("y",)

    def __init__(self, *seconds: float, retired: bool = False, broken: bool = False) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        self.runs = self.pins = 0
        self.seconds = seconds
        self.retired, self.broken = retired, broken

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        assert (feeds, outputs) == (FEEDS, ("y",))
        assert self.pins == 1, "the session could be closed meanwhile"
        if self.broken:
            raise EngineFailure("no")
        self.now += self.seconds[min(self.runs, len(self.seconds) - 1)]
        self.runs += 1
        return {}

    def stop(self, thread: int) -> None:
        raise AssertionError(thread)

    def pin(self) -> bool:
        self.pins += not self.retired
        return not self.retired

    def unpin(self) -> None:
        self.pins -= 1

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def measured(self, runs: int = RUNS) -> float | None:
        return median_run_s(self, lambda: self.now, runs, self.sleep)


def test_a_slow_first_run_and_a_hiccup_do_not_count() -> None:
    release = Clocked(0.5, 0.01, 0.01, 0.3, 0.01)
    assert release.measured() == pytest.approx(0.01)
    assert release.runs == RUNS + 1
    assert release.pins == 0


def test_fewer_runs_can_be_asked_for() -> None:
    release = Clocked(0.01)
    assert release.measured(FEW_RUNS) == pytest.approx(0.01)
    assert release.runs == FEW_RUNS + 1


def test_between_two_runs_there_is_a_pause_as_long_as_a_run() -> None:
    release = Clocked(0.02)
    release.measured()
    assert release.slept == pytest.approx([0.02] * RUNS)


def test_no_run_begins_when_the_time_is_up_and_one_run_is_a_measurement() -> None:
    slow = Clocked(MEASURE_S_MAX * 2)
    assert slow.measured() == pytest.approx(MEASURE_S_MAX * 2)
    assert slow.runs == 1
    some = Clocked(MEASURE_S_MAX / 5)
    assert some.measured() == pytest.approx(MEASURE_S_MAX / 5)
    assert 1 < some.runs < RUNS


def test_a_release_that_is_given_up_or_fails_a_run_has_no_time() -> None:
    assert Clocked(0.01, retired=True).measured() is None
    broken = Clocked(0.01, broken=True)
    assert broken.measured() is None
    assert broken.pins == 0
