"""A download under way: `<digest>.part` beside the place where the finished file goes.

The file holds the first of the bytes that are wanted (an artifact's, or those of some ranges of it) and nothing else,
so its length says where to go on, after a break as after a kill. Blocks are written as they come and flushed to the
disk now and then. A power cut may leave rubbish where they were not, so after one only what was flushed for sure is
kept (`cut_to_flushed`). What is believed in the end is only the finished file, checked as it is read back from the
disk. Nothing is ever written past the promised size.

The methods block; call them in a thread. A lock keeps a write that was abandoned by a cancelled task from meeting the
closed file, whose descriptor may by then be another's.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from common import durable
from common.artifact import ArtifactRef, hex_of
from common.artifact.protobuf import Span
from common.errors import IntegrityFailure, StorageFull, Unavailable
from common.wire.messages import Transport
from edge_agent.fetch.transfer import Ranges

FLUSH_BYTES = 8 * 1024 * 1024
"""The file is flushed each time it has grown past a multiple of this: a power cut costs at most that much of it."""

BLOCK_BYTES_MAX = 256 * 1024
"""The largest block that is appended at once."""


class Partial:
    """The partial file of one artifact or of ranges of it, open for appending.

    `total` is how long it becomes, `resumed` what of it was there when it was opened,
    `moved` what was appended since, `transport` how the last of that came.
    """

    def __init__(
        self, ref: ArtifactRef, destination: Path, ranges: Ranges | None = None, moved_max: int | None = None
    ) -> None:
        self.ref = ref
        self.moved_max = moved_max
        self.whole = ranges is None
        self.path = partial_path(ref, destination, ranges)
        self.total = total(ref, ranges)
        self._spans = ranges.spans if ranges else (Span(0, ref.size),)
        self._holds = holding(ref, ranges)
        self.moved = 0
        self.transport: Transport = "none"
        self._destination = destination
        self._lock = threading.Lock()
        self._closed = False
        self._file = durable.GrowingFile(self.path)
        self.resumed = self.size
        self._flushed = 0
        if self.size > self.total:
            self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            with contextlib.suppress(StorageFull, OSError):  # for a power cut after this; the bytes are checked anyway
                self._flush()
            self._file.close()

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._file.size

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        return self.total - self.size

    def spans(self) -> Iterator[Span]:
        """Where in the artifact the bytes lie that are still to come, in order, none of them empty."""
        before = 0
        for span in self._spans:
            start = span.start + max(0, self.size - before)
            before += span.end - span.start
            if start < span.end:
                yield Span(start, span.end)

    def append(self, block: bytes, transport: Transport) -> None:
        """Write the next bytes. Raises `StorageFull`, and `IntegrityFailure` for bytes past the promised size."""
        if len(block) > self.missing:
            raise IntegrityFailure(f"more than the promised {self.total} bytes came for {self.ref.digest}")
        with self._lock:
            if self._closed:
                return
            self.transport = transport
            before = self.size
            try:
                self._file.append(block)
            finally:
                self.moved += self.size - before
            if self.size // FLUSH_BYTES > before // FLUSH_BYTES:
                self._flush()

    def check_limit(self) -> None:
        """Raise `Unavailable` when the missing bytes are more than may still be moved."""
        if self.moved_max is not None and self.moved + self.missing > self.moved_max:
            message = f"{self.missing} bytes must be fetched, {self.moved_max - self.moved} may be"
            raise Unavailable(message, fix="what the update costs is looked at again")

    def restart(self) -> None:
        """Forget what came so far."""
        self._file.cut(0)
        self._flushed = self.resumed = 0

    def finish(self) -> None:
        """Verify the whole file and give it its final name, durably; `IntegrityFailure` when the bytes are wrong."""
        with self._lock:
            self._file.sync()
            self._flushed = self.size
        if not self._holds(self.path):
            raise IntegrityFailure(f"the bytes that came are not {'' if self.whole else 'of '}{self.ref.digest}")
        durable.commit_file(self.path, self._destination)

    def discard(self) -> None:
        """Remove the file: its bytes are worth nothing."""
        durable.remove(self.path)

    def _flush(self) -> None:
        if self._flushed != self.size:
            self._file.sync()
            self._flushed = self.size


def cut_to_flushed(path: Path) -> None:
    """Keep of a partial file, after the power was cut, what had been flushed for sure.

    It grows by a block at a time and is flushed right after the one that takes it past a multiple of `FLUSH_BYTES`, so
    all before the last multiple that lies at least a block behind its end is on the disk.
    """
    file = durable.GrowingFile(path)
    try:
        file.cut(max(0, file.size - BLOCK_BYTES_MAX) // FLUSH_BYTES * FLUSH_BYTES)
    finally:
        file.close()


def partial_path(ref: ArtifactRef, destination: Path, ranges: Ranges | None = None) -> Path:
    """Where the unfinished bytes are kept; named by digest, so that two artifacts can never be spliced.

    Ranges are named as their destination is: whoever chooses it must give other ranges another name.
    """
    return destination.with_name(f"{destination.name if ranges else hex_of(ref.digest)}.part")


def total(ref: ArtifactRef, ranges: Ranges | None) -> int:
    """How many bytes are wanted."""
    return sum(span.end - span.start for span in ranges.spans) if ranges else ref.size


def holding(ref: ArtifactRef, ranges: Ranges | None) -> Callable[[Path], bool]:
    """The check whether a file is what is wanted."""
    return ranges.holds if ranges else lambda path: holds(path, ref)


def holds(path: Path, ref: ArtifactRef) -> bool:
    """Whether the file at `path` is exactly the artifact."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != ref.size:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == hex_of(ref.digest)
    except FileNotFoundError:
        return False
