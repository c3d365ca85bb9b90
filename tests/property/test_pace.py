"""A busy device puts a load off, does not dither about it, and not for ever."""

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.update.pace import Pace, PaceLimits, Sample, judged, may_load

LIMITS = PaceLimits()
LATENCIES = st.none() | st.floats(0, 5)
SAMPLES = st.builds(lambda cpu, latency: Sample(cpu_percent=cpu, latency_s=latency), st.floats(0, 100), LATENCIES)
WINDOWS = st.lists(SAMPLES, min_size=1, max_size=3)


def paces(windows: list[list[Sample]]) -> list[Pace]:
    pace, found = Pace(), []
    for window in windows:
        pace = judged(pace, window, LIMITS)
        found.append(pace)
    return found


@given(st.lists(st.lists(st.floats(0.9 * 85 + 0.1, 84.9), min_size=1, max_size=3), min_size=1), st.booleans())
def test_a_load_within_the_hysteresis_changes_nothing(loads: list[list[float]], busy: bool) -> None:
    first = [[Sample(cpu_percent=100.0 if busy else 0.0, latency_s=None)]]
    windows = [[Sample(cpu_percent=cpu, latency_s=None) for cpu in window] for window in loads]
    assert {pace.busy for pace in paces(first + windows)} == {busy}


@given(st.lists(st.floats(0.451, 0.499), min_size=1), st.booleans())
def test_nor_do_latencies_within_it(latencies: list[float], busy: bool) -> None:
    first = [[Sample(cpu_percent=10.0, latency_s=2.0 if busy else 0.1)]]
    windows = [[Sample(cpu_percent=10.0, latency_s=each)] for each in latencies]
    assert {pace.busy for pace in paces(first + windows)} == {busy}


@given(st.lists(WINDOWS, min_size=1))
def test_busy_begins_only_at_a_limit_and_ends_only_below_both(windows: list[list[Sample]]) -> None:
    before = Pace()
    for window, pace in zip(windows, paces(windows), strict=True):
        cpu = sum(sample.cpu_percent for sample in window) / len(window)
        seen = [sample.latency_s for sample in window if sample.latency_s is not None]
        latency = sum(seen) / len(seen) if seen else 0.0
        if pace.busy and not before.busy:
            assert cpu >= LIMITS.cpu_percent_max or latency >= LIMITS.latency_s_max
        if before.busy and not pace.busy:
            assert cpu < 0.9 * LIMITS.cpu_percent_max
            assert latency < 0.9 * LIMITS.latency_s_max
        assert bool(pace.reason) == pace.busy
        before = pace


@given(st.lists(WINDOWS), st.floats(0, 10_000))
def test_nothing_waits_longer_than_the_maximum(windows: list[list[Sample]], waited_s: float) -> None:
    pace = (paces(windows) or [Pace()])[-1]
    assert may_load(pace, waited_s=LIMITS.defer_s_max + waited_s, limits=LIMITS)
    assert may_load(Pace(), waited_s=waited_s, limits=LIMITS)
    assert may_load(Pace(True, "busy"), waited_s=min(waited_s, 59.0), limits=LIMITS) is False


def test_no_news_changes_nothing() -> None:
    assert judged(Pace(True, "busy"), [], LIMITS) == Pace(True, "busy")
