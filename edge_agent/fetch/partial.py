"""A download under way: `<digest>.part` beside the place where the finished file goes.

The file holds the artifact's first bytes and nothing else, so its length says where to go on, after a break as after a
kill. Blocks are written as they come and flushed to the disk now and then; a power cut may leave rubbish at the end,
and what is believed in the end is only the digest of the whole file, read back from the disk. Nothing is ever
written past the promised size.

The methods block; call them in a thread. A lock keeps a write that was abandoned by a cancelled task from meeting the
closed descriptor, whose number may by then be another file's.
"""

import hashlib
import os
import threading
from pathlib import Path
from typing import Self

from common.artifact import ArtifactRef, hex_of
from common.durable import PRIVATE_MODE, commit_file, explaining_full_disk
from common.errors import IntegrityFailure
from common.wire.messages import Transport

FLUSH_BYTES = 8 * 1024 * 1024
"""A power cut costs at most about this much of a download."""


class Partial:
    """The partial file of one artifact, open for appending.

    `size` is what is in the file, `resumed` what of it was there when it was opened, `moved` what was appended since,
    `transport` how the last of that came.
    """

    def __init__(self, ref: ArtifactRef, destination: Path) -> None:
        self.ref = ref
        self.path = partial_path(ref, destination)
        self.moved = 0
        self.transport: Transport = "none"
        self._destination = destination
        self._unflushed = 0
        self._open = threading.Lock()
        with explaining_full_disk(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_MODE)
        self.size = self.resumed = os.fstat(self._descriptor).st_size
        if self.size > ref.size:
            self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._open:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        return self.ref.size - self.size

    def append(self, block: bytes, transport: Transport) -> None:
        """Write the next bytes. Raises `StorageFull`, and `IntegrityFailure` for bytes past the promised size."""
        if len(block) > self.missing:
            raise IntegrityFailure(f"more than the promised {self.ref.size} bytes came for {self.ref.digest}")
        self.transport = transport
        with self._open, explaining_full_disk(self.path):
            view = memoryview(block)
            while view:
                written = os.pwrite(self._descriptor, view, self.size)
                self.size += written
                self.moved += written
                self._unflushed += written
                view = view[written:]
            if self._unflushed >= FLUSH_BYTES:
                self._flush()

    def restart(self) -> None:
        """Forget what came so far."""
        os.ftruncate(self._descriptor, 0)
        self.size = self.resumed = 0

    def finish(self) -> None:
        """Verify the whole file and give it its final name, durably; `IntegrityFailure` when the bytes are wrong."""
        with self._open, explaining_full_disk(self.path):
            self._flush()
        if not holds(self.path, self.ref):
            raise IntegrityFailure(f"the bytes that came are not {self.ref.digest}")
        commit_file(self.path, self._destination)

    def discard(self) -> None:
        """Remove the file: its bytes are worth nothing."""
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        os.fsync(self._descriptor)
        self._unflushed = 0


def partial_path(ref: ArtifactRef, destination: Path) -> Path:
    """Where the unfinished bytes are kept; named by digest, so that two artifacts can never be spliced."""
    return destination.with_name(f"{hex_of(ref.digest)}.part")


def holds(path: Path, ref: ArtifactRef) -> bool:
    """Whether the file at `path` is exactly the artifact."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != ref.size:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == hex_of(ref.digest)
    except FileNotFoundError:
        return False
