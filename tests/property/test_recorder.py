"""Telemetry windows: every request is in exactly one of them, in the bucket of its latency."""

import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ids import ModelName, Version
from common.wire import LATENCY_BOUNDS_S, RUN_ROWS_BOUNDS, NotRun
from edge_agent.telemetry.recorder import Recorder


class Request(NamedTuple):
    """One recorded request; `cut` ends the windows after it."""

    version: Version
    latency_s: float | None
    error: bool
    cut: bool


REQUESTS = st.builds(
    Request,
    st.sampled_from(["1", "2"]).map(Version),
    st.none() | st.floats(0, 20) | st.sampled_from(LATENCY_BOUNDS_S),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(REQUESTS, max_size=40))
def test_windows_add_up_to_what_happened(requests: list[Request]) -> None:
    recorder = Recorder(0.0)
    windows = []
    for now, request in enumerate(requests, 1):
        recorder.record(ModelName("m"), request.version, request.latency_s, error=request.error)
        if request.cut:
            windows += recorder.cut(float(now))
    windows += recorder.cut(len(requests) + 1.0)
    for version in ("1", "2"):
        mine = [request for request in requests if request.version == version]
        own = [window for window in windows if window.version == version]
        answered = [request.latency_s for request in mine if request.latency_s is not None]
        assert sum(window.requests for window in own) == len(mine)
        assert sum(window.errors for window in own) == sum(request.error for request in mine)
        assert sum(sum(window.latency_counts) for window in own) == len(answered)
        for index, bound in enumerate(LATENCY_BOUNDS_S):
            below = sum(sum(window.latency_counts[: index + 1]) for window in own)
            assert below == sum(latency <= bound for latency in answered)
    assert all(window.requests > 0 for window in windows)


RUNS = st.tuples(st.integers(1, 100), st.lists(st.floats(0, 20) | st.sampled_from(LATENCY_BOUNDS_S), max_size=8))


@given(st.lists(RUNS, max_size=30), st.lists(st.sampled_from(["refused", "expired", "cancelled"]), max_size=9))
def test_every_run_is_in_the_bucket_of_its_rows_and_every_wait_in_that_of_its_time(
    runs: list[tuple[int, list[float]]], left: list[NotRun]
) -> None:
    recorder = Recorder(0.0)
    for rows, waits in runs:
        recorder.ran(ModelName("m"), Version("1"), rows, 0.5, waits)
    for why in left:
        recorder.not_run(ModelName("m"), Version("1"), why)
    windows = recorder.cut(1.0)
    assert len(windows) == bool(runs or left)
    if windows:
        (window,) = windows
        waited = [wait for _, waits in runs for wait in waits]
        assert (window.run_rows, window.run_sum_s) == (sum(rows for rows, _ in runs), 0.5 * len(runs))
        assert (window.queue_sum_s, window.queue_max_s) == (sum(waited), max(waited, default=0.0))
        for index, bound in enumerate(RUN_ROWS_BOUNDS):
            assert sum((window.run_counts or (0,) * 8)[: index + 1]) == sum(rows <= bound for rows, _ in runs)
        for index, bound_s in enumerate(LATENCY_BOUNDS_S):
            assert sum((window.queue_counts or (0,) * 17)[: index + 1]) == sum(wait <= bound_s for wait in waited)
        assert [window.refused, window.expired, window.cancelled] == [
            left.count("refused"), left.count("expired"), left.count("cancelled"),
        ]  # fmt: skip


@given(st.lists(st.integers(0, 3), max_size=20))
def test_windows_of_a_release_follow_each_other_without_overlap(requests_before_cut: list[int]) -> None:
    recorder = Recorder(100.0)
    ends = [100.0]
    for count in requests_before_cut:
        for _ in range(count):
            recorder.record(ModelName("m"), Version("1"), 0.01, error=False)
        for window in recorder.cut(ends[-1] + 1):
            assert window.started_at == ends[-1]
        ends.append(ends[-1] + 1)


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns after a microsecond instead of 5 ms, so that a missing lock shows."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("eager_switching")
def test_no_request_is_lost_between_threads_and_cuts() -> None:
    recorder = Recorder(0.0)
    each = 5_000

    def work() -> None:
        for _ in range(each):
            recorder.record(ModelName("m"), Version("1"), 0.001, error=False)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    windows = []
    while any(thread.is_alive() for thread in threads):
        windows += recorder.cut(1.0)
    for thread in threads:
        thread.join()
    windows += recorder.cut(2.0)
    assert sum(window.requests for window in windows) == 4 * each
