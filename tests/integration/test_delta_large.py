"""Files of more than 4 GiB, through the real file source: offsets have 64 bits, and a device needs no more memory than
for small ones. The files are sparse, so they take no disk.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

MIB = 2**20
SIZE = 2**32 + 24 * MIB
MAKE_BYTES_MAX = 300 * MIB
APPLY_BYTES_MAX = 50 * MIB
"""Of a whole process, which a device must have to spare."""
CHILD_TIMEOUT_S = 170.0

# Peak memory is that of the child alone, and has nothing of its parent's or of what was forked.
PEAK = """
import re
peak_kb = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps({"said": said, "peak": peak_kb * 1024}))
"""
MAKE = """
import json, sys
from pathlib import Path
from common import delta
from common.filesource import FileSource

folder = Path(sys.argv[1])
with FileSource(folder / "base") as base, FileSource(folder / "target") as target, (folder / "patch").open("wb") as out:
    made = delta.make(base, target, out.write)
said = [made.target.digest, made.target.size, made.patch_bytes]
"""
APPLY = """
import json, sys
from pathlib import Path
from common import delta
from common.artifact.manifest import ArtifactRef
from common.filesource import FileSource
from common.ids import Digest

folder, digest, size = Path(sys.argv[1]), Digest(sys.argv[2]), int(sys.argv[3])
longest = 0

def sink(piece):  # apply hashes what it writes; nothing else needs it
    global longest
    longest = max(longest, len(piece))

with FileSource(folder / "base") as base, FileSource(folder / "patch") as patch:
    delta.apply(base, patch, sink, target=ArtifactRef(digest, size))
said = [longest]
"""


class Said(NamedTuple):
    """What a child printed, and the most memory that it held, in bytes."""

    said: list[Any]
    peak: int


def child(program: str, *arguments: object) -> Said:
    done = subprocess.run(
        [sys.executable, "-c", program + PEAK, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Said(**json.loads(done.stdout))


def write(path: Path, places: dict[int, bytes]) -> None:
    with path.open("wb") as file:
        os.truncate(path, SIZE)
        for place, data in places.items():
            file.seek(place)
            file.write(data)


@pytest.mark.timeout(400)
def test_changes_beyond_4_gib_cost_little_and_are_applied_within_50_mb(tmp_path: Path) -> None:
    rows = 1024
    span = rows * rows * 4
    # A tensor before 2^31, one across 2^31 and one beyond 2^32; between them what no header speaks of.
    starts = (1_000, 2**31 - span // 2 - 4_000, 2**32 + 4 * MIB - 4_000)
    entries = {
        f"w{number}": {"dtype": "F32", "shape": (rows, rows), "data_offsets": (start, start + span)}
        for number, start in enumerate(starts)
    }
    head = json.dumps(entries).encode().ljust(3_992)
    old = np.random.default_rng(1).standard_normal((rows, rows), np.float32)
    new = old.copy()
    new[::100] *= np.float32(1.001)
    noise = random.Random(1).randbytes(MIB)
    base = {0: len(head).to_bytes(8, "little") + head} | {4_000 + start: old.tobytes() for start in starts}
    target = base | {4_000 + start: new.tobytes() for start in starts[1:]}
    write(tmp_path / "base", base | {2**31 + 100 * MIB: noise})
    write(tmp_path / "target", target | {2**32 - 5: b"across 2^32", 2**32 + 16 * MIB + 7: noise})

    made = child(MAKE, tmp_path)
    digest, size, patch_bytes = made.said
    applied = child(APPLY, tmp_path, digest, size)

    assert size == SIZE
    changed_bytes = 2 * new[::100].nbytes
    assert patch_bytes < changed_bytes + 2_000  # the noise was found where it lay, 2 GiB away
    assert made.peak < MAKE_BYTES_MAX
    assert applied.peak < APPLY_BYTES_MAX
    assert applied.said[0] <= MIB
