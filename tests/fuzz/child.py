"""One target under libFuzzer: `python -m tests.fuzz.child TARGET [libFuzzer options] [corpus]`.

Memory has a limit per run besides libFuzzer's own: what a run may add to the address space of this process. Whatever
goes beyond fails with a `MemoryError`, which is a finding like any other exception.
"""

import os
import resource
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["common.delta", "common.artifact"]):
    from tests.fuzz.targets import TARGETS, fuzzed

ADDED_BYTES_MAX = 64 * 1024 * 1024
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_, HARD_LIMIT = resource.getrlimit(resource.RLIMIT_AS)


def main() -> None:
    run, seeds = TARGETS[sys.argv[1]]
    for _ in seeds():
        pass  # what they are made of is made now, not on the time of the first run

    def once(data: bytes) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * PAGE_BYTES + ADDED_BYTES_MAX, HARD_LIMIT))
        try:
            fuzzed(run, data)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (HARD_LIMIT, HARD_LIMIT))

    atheris.Setup([sys.argv[0], *sys.argv[2:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
