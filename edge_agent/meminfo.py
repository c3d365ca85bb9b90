"""How much memory programs on this machine can still get, as Linux tells it: the machine's and its cgroup's limits.

Sources: proc(5) for `MemAvailable`; the kernel's "Control Group v2" (`memory.max`, `memory.current`, `memory.stat`). A
cgroup and every one above it may have a limit; pages of files not used lately are given back before it kills.
"""

from pathlib import Path, PurePosixPath

import psutil

CGROUPS = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")


def available_bytes(meminfo: Path = MEMINFO, own: Path = SELF, cgroups: Path = CGROUPS) -> int | None:
    """The tightest of all limits; None where the kernel tells none."""
    left = [_machine(meminfo), *(_group(folder) for folder in _groups(own, cgroups))]
    return min((size for size in left if size is not None), default=None)


def used_bytes() -> int:
    """This program's resident memory."""
    return int(psutil.Process().memory_info().rss)


def _machine(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(own: Path, cgroups: Path) -> list[Path]:
    """The folders of this process's cgroup and of those above it."""
    for line in _lines(own):
        number, _, name = line.split(":", 2)
        if number == "0":
            inside = PurePosixPath(name.lstrip("/"))
            return [cgroups / inside, *(cgroups / parent for parent in inside.parents)]
    return []


def _group(folder: Path) -> int | None:
    limit, current = _lines(folder / "memory.max"), _lines(folder / "memory.current")
    if not (limit and current) or limit[0] == "max":
        return None
    stat = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
    return max(0, int(limit[0]) - int(current[0]) + int(stat.get("inactive_file", 0)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
