"""Files of more than 4 GiB, through the real file source: offsets have 64 bits, and a device needs no more memory than
for small ones. The files are sparse, so they take no disk. And patches that are as large in everything as the format
allows, which nobody would make: not even they need more.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from common.delta import frames, sparse
from common.delta.codecs import CODEC_ZSTD
from common.delta.layout import (
    CONTROL_BYTES_MAX,
    DIFFERENCE_BYTES_MAX,
    FRAME_PREFIX_BYTES_MAX,
    FRAMED,
    LITERAL_BYTES_MAX,
    PREFIX_BYTES_MAX,
    PREFIXED,
    RAW,
    READ_BYTES_MIN,
    SPARSE,
)
from common.delta.tensors import ZSTD, Block, DType, Method, Plan, pack_low_rank
from common.delta.tensors.low_rank import FACTOR_ELEMENTS_MAX, RANK_MAX
from common.delta.varint import varint
from tests.patches import add, block, copy, header, literal, reference_to, section

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


BASE = np.random.default_rng(2).integers(0, 256, 8 * MIB, np.uint8)
ELEMENTS = BASE[:MIB].view("<u4")


def largest_packed_differences() -> tuple[bytes, bytes]:
    """A target and what makes it: differences with as many runs as fit."""
    size = DIFFERENCE_BYTES_MAX
    differences = np.zeros(size, np.uint8)
    differences[::5] = 1
    packed = sparse.pack(differences.tobytes())
    control, frame = add(size), frames.compress(packed, level=1)
    sizes = b"".join(map(varint, (len(control), size, len(packed), len(frame))))
    return (BASE[:size] + differences).tobytes(), bytes([RAW | SPARSE << 4]) + sizes + control + frame


def largest_differences() -> tuple[bytes, bytes]:
    size = DIFFERENCE_BYTES_MAX
    control, frame = add(size), frames.compress(b"\1" * size, level=1)
    sizes = b"".join(map(varint, (len(control), size, len(frame))))
    return (BASE[:size] + np.uint8(1)).tobytes(), bytes([RAW | FRAMED << 4]) + sizes + control + frame


def most_operations_and_literals() -> tuple[bytes, bytes]:
    """A section full of copies that are long enough to be kept in mind for the prefix of its literals."""
    step = copy(READ_BYTES_MIN, -READ_BYTES_MIN)
    control = copy(READ_BYTES_MIN) + step * ((CONTROL_BYTES_MAX - 10) // len(step) - 1) + literal(LITERAL_BYTES_MAX)
    literals = BASE[MIB : MIB + LITERAL_BYTES_MAX].tobytes()
    prefix = BASE[READ_BYTES_MIN : READ_BYTES_MIN + PREFIX_BYTES_MAX].tobytes()
    streams = (frames.compress(control, level=1), frames.compress(literals, prefix=prefix, level=1))
    sizes = b"".join(map(varint, (len(control), len(streams[0]), len(literals), len(streams[1]))))
    copies = (CONTROL_BYTES_MAX - 10) // len(step)
    target = BASE[:READ_BYTES_MIN].tobytes() * copies + literals
    return target, bytes([FRAMED | PREFIXED << 2]) + sizes + b"".join(streams)


def largest_frame() -> tuple[bytes, bytes]:
    """A frame whose window and prefix are as large as they may be."""
    prefix = BASE[:FRAME_PREFIX_BYTES_MAX].tobytes()
    content = np.random.default_rng(3).bytes(6 * MIB) * 3 + prefix[MIB:]
    frame = frames.compress(content, prefix=prefix, level=1)
    head = bytes(1) + varint(len(content)) + b"\1\0" + varint(FRAME_PREFIX_BYTES_MAX) + varint(len(frame))
    return content, head + frame


def highest_rank() -> tuple[bytes, bytes]:
    rank, columns = RANK_MAX, FACTOR_ELEMENTS_MAX // RANK_MAX
    rows = len(ELEMENTS) // columns
    chance = np.random.default_rng(4)
    plan = Plan(chance.integers(-(2**40), 2**40, (rows, rank)), chance.integers(-(2**20), 2**20, (rank, columns)), 60)
    shape = Block(DType.F32, DType.F32, rows * columns, columns)
    new = ELEMENTS ^ chance.integers(0, 2**32, len(ELEMENTS), np.uint32)
    payload = pack_low_rank(plan, 0, ELEMENTS, new, shape, ZSTD)
    head = block(shape.count, len(payload), method=Method.LOW_RANK, dtype=DType.F32, old=DType.F32, columns=columns)
    return new.tobytes(), section(head, payloads=payload)


LARGEST = (
    largest_packed_differences, largest_differences, most_operations_and_literals, largest_frame, highest_rank,
)  # fmt: skip


@pytest.mark.parametrize("largest", LARGEST, ids=lambda build: build.__name__)
def test_the_largest_sections_that_there_can_be_are_applied_within_50_mb(
    largest: Callable[[], tuple[bytes, bytes]], tmp_path: Path
) -> None:
    target, body = largest()
    base = BASE.tobytes()
    (tmp_path / "base").write_bytes(base)
    (tmp_path / "patch").write_bytes(header(base, target, CODEC_ZSTD) + body)
    applied = child(APPLY, tmp_path, reference_to(target).digest, len(target))
    assert applied.peak < APPLY_BYTES_MAX
    assert applied.said[0] <= MIB
