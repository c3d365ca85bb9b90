"""The telemetry spool on a real disk: order, caps, crashes."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import StorageFull
from common.ids import ModelName, Version
from common.wire import DeviceWindow, TelemetryWindow
from edge_agent.telemetry.spool import Spool

WRITER = """
import sys
from pathlib import Path
from tests.integration.test_spool import window
from edge_agent.telemetry.spool import Spool

spool = Spool(Path(sys.argv[1]))
for number in range(1_000_000):
    spool.add([window(number)])
    print(number, flush=True)
"""


def window(number: int) -> TelemetryWindow:
    """A window that can be told from others by its number of requests."""
    return TelemetryWindow(
        model=ModelName("m"),
        version=Version("1"),
        started_at=0.0,
        ended_at=1.0,
        requests=number,
        errors=0,
        latency_counts=(0,) * 17,
        latency_sum_s=0.0,
    )


def numbers(spool: Spool, limit: int = 1_000_000) -> list[int]:
    return [entry.window.requests for entry in spool.peek(limit) if isinstance(entry.window, TelemetryWindow)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


def test_windows_come_out_in_order_stay_until_dropped_and_survive_a_restart(path: Path) -> None:
    spool = Spool(path)
    spool.add([window(1), window(2)])
    spool.add([window(3)])
    assert numbers(spool, 2) == [1, 2]
    spool.drop([spooled.id for spooled in spool.peek(2)])
    spool.close()
    spool = Spool(path)
    assert numbers(spool) == [3]
    spool.drop([1, 2, 99])
    assert (len(spool), spool.lost) == (1, 0)
    spool.close()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 6) | st.integers(-4, -1), max_size=15), st.integers(1, 10))
def test_it_behaves_like_a_capped_queue(tmp_path: Path, steps: list[int], rows_max: int) -> None:
    """Positive steps add so many windows at once, negative ones drop so many of the oldest."""
    path = tmp_path / "model.db"
    path.unlink(missing_ok=True)
    spool = Spool(path, rows_max=rows_max)
    queue: list[int] = []
    next_number = lost = 0
    for step in steps:
        if step > 0:
            added = list(range(next_number, next_number + step))
            next_number += step
            spool.add(map(window, added))
            queue += added
            over = max(0, len(queue) - rows_max)
            lost += over
            del queue[:over]
        else:
            spool.drop([spooled.id for spooled in spool.peek(-step)])
            del queue[:-step]
        assert (numbers(spool), len(spool), spool.lost) == (queue, len(queue), lost)
    spool.close()


def test_the_cap_in_bytes_throws_the_oldest_away(path: Path) -> None:
    one = len(msgspec.json.encode(window(100)))
    spool = Spool(path, bytes_max=10 * one + one // 2)
    for number in range(100, 200):
        spool.add([window(number)])
    assert numbers(spool) == list(range(190, 200))
    assert spool.lost == 90
    spool.close()


def test_windows_of_releases_and_of_the_device_come_out_as_they_went_in(path: Path) -> None:
    device = DeviceWindow(started_at=0.0, ended_at=1.0, cpu_s=0.5, rss_bytes=10, windows_lost=3, files_bad=1)
    spool = Spool(path)
    spool.add([window(1), device])
    assert [entry.window for entry in spool.peek(9)] == [window(1), device]
    spool.close()


def test_what_is_taken_at_once_keeps_within_bytes_and_is_never_nothing(path: Path) -> None:
    one = len(msgspec.json.encode(window(100)))
    spool = Spool(path)
    spool.add([window(number) for number in range(100, 110)])
    assert len(spool.peek(100, 3 * one)) == 3
    assert len(spool.peek(2, 3 * one)) == 2
    assert [entry.size for entry in spool.peek(100, 1)] == [one], "one that is larger than the limit must go out alone"
    spool.close()


def test_ids_are_never_used_twice_so_a_late_drop_hits_nothing_new(path: Path) -> None:
    spool = Spool(path)
    spool.add([window(1)])
    old = [spooled.id for spooled in spool.peek(1)]
    spool.drop(old)
    spool.add([window(2)])
    spool.drop(old)
    assert numbers(spool) == [2]
    spool.close()


def test_what_add_returned_from_survives_a_kill(path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(path)]
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as writer:
        assert writer.stdout
        for line in writer.stdout:
            if int(line) == 40:
                os.kill(writer.pid, signal.SIGKILL)
                break
        confirmed = [int(line) for line in writer.stdout if line.endswith("\n")]
    spool = Spool(path)
    found = numbers(spool)
    assert found == list(range(len(found)))
    assert len(found) > max(confirmed, default=40)
    spool.close()


def test_a_file_that_cannot_be_read_is_set_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"this is no database, but long enough to be taken for one" * 100)
    spool = Spool(path)
    spool.add([window(1)])
    assert numbers(spool) == [1]
    assert path.with_name("spool.db.unreadable").is_file()
    assert "a new one is begun" in caplog.text
    spool.close()


def test_a_full_disk_is_named_and_changes_nothing(path: Path) -> None:
    spool = Spool(path)
    spool.add([window(1)])
    with sqlite3.connect(path) as outside:
        pages = outside.execute("pragma page_count").fetchone()[0]
    outside.close()
    spool._connection.execute(f"pragma max_page_count = {pages}")  # the disk that SQLite sees is full
    with pytest.raises(StorageFull, match="free some space"):
        spool.add([window(number) for number in range(2_000)])
    assert numbers(spool) == [1]
    spool.close()
