"""How the machine feels at this moment: the numbers of a heartbeat, asked of the operating system."""

import shutil
from pathlib import Path

import psutil

from common.clock import Clock
from common.ids import DeviceId, ModelName, Version
from common.wire import Heartbeat


class CpuLoad:
    """How busy all processors were since the last call, or at first since this was made."""

    def __init__(self) -> None:
        self._last = self._times()

    def percent(self) -> float:
        """0 to 100; 0 when no time has passed."""
        before, self._last = self._last, self._times()
        total, idle = (now - then for now, then in zip(self._last, before, strict=True))
        return 100.0 * (1.0 - idle / total) if total > 0 else 0.0

    def _times(self) -> tuple[float, float]:
        """In all, and idle or waiting for a disk; seconds."""
        times = psutil.cpu_times()
        return sum(times[:8]), times.idle + getattr(times, "iowait", 0.0)


class Vitals:
    """Reads the machine. CPU load is the mean since the last reading, so there must be one of these."""

    def __init__(self, data: Path, clock: Clock) -> None:
        self._data = data
        self._clock = clock
        self._started = clock.monotonic()
        psutil.cpu_percent(None)  # the first reading only sets the mark

    def heartbeat(
        self, device: DeviceId, generation: int, running: dict[ModelName, Version], not_modified: int
    ) -> Heartbeat:
        """A heartbeat, to be stamped by whoever sends it. `uptime_s` is the agent's, everything else the machine's."""
        memory, disk = psutil.virtual_memory(), shutil.disk_usage(self._data)
        return Heartbeat(
            device=device,
            epoch=0,
            seq=0,
            sent_at=0.0,
            uptime_s=self._clock.monotonic() - self._started,
            load_1m=psutil.getloadavg()[0],
            cpu_percent=psutil.cpu_percent(None),
            memory_bytes=memory.total,
            memory_available_bytes=memory.available,
            disk_bytes=disk.total,
            disk_free_bytes=disk.free,
            generation=generation,
            running=running,
            not_modified=not_modified,
        )
