"""What the agent's process uses, and what went wrong on its disk: the numbers of a `DeviceWindow`.

`Findings` counts; whoever finds something adds to it, on any thread. `UsageMeter` reads the operating system once a
window: CPU time since the last reading, memory as it is now. The proportional set size is the fair number for a process
that shares pages with others (a model file that two of them map); Linux tells it in /proc since 4.14.
"""

import threading
from pathlib import Path

import psutil

from common.wire import DeviceWindow

SMAPS_ROLLUP = Path("/proc/self/smaps_rollup")
KIB = 1024


class Findings:
    """How many installed files went bad and how many of them were mended, since the last `take`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bad = self._mended = 0

    def bad(self) -> None:
        """A file is not what it was."""
        with self._lock:
            self._bad += 1

    def mended(self) -> None:
        """A bad file is whole again."""
        with self._lock:
            self._mended += 1

    def take(self) -> tuple[int, int]:
        """Bad and mended files, counted anew from here on."""
        with self._lock:
            counts, self._bad, self._mended = (self._bad, self._mended), 0, 0
        return counts


class UsageMeter:
    """Makes device windows. `started_at` is wall time in seconds since the epoch."""

    def __init__(self, started_at: float, findings: Findings) -> None:
        self._process = psutil.Process()
        self._findings = findings
        self._started_at = started_at
        self._cpu_s = self._used_s()

    def cut(self, now: float, windows_lost: int) -> DeviceWindow:
        """End the window at `now`; `windows_lost` is the spool's count."""
        before, self._cpu_s = self._cpu_s, self._used_s()
        started_at, self._started_at = self._started_at, now
        bad, mended = self._findings.take()
        return DeviceWindow(
            started_at=started_at,
            ended_at=now,
            cpu_s=max(0.0, self._cpu_s - before),
            rss_bytes=self._process.memory_info().rss,
            pss_bytes=_pss_bytes(),
            windows_lost=windows_lost,
            files_bad=bad,
            files_mended=mended,
        )

    def _used_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def _pss_bytes() -> int | None:
    try:
        lines = SMAPS_ROLLUP.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("Pss:")), None)
    return int(found[1]) * KIB if found else None
