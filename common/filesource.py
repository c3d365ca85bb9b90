"""A file as a `ByteSource`: positioned reads on one open descriptor, safe to share between threads.

The size is taken when the file is opened. Files of models are never written in place (`common.durable` replaces them),
so an open source keeps showing what it was opened on.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Self


class FileSource:
    """Close it, or use it in a `with` statement. `OSError` as `open` raises it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._descriptor).st_size

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        """See `ByteSource.read_at`. One `pread` may stop early (it never gives more than 2 GiB), so it is repeated."""
        wanted = max(0, min(length, self._size - offset))
        first = os.pread(self._descriptor, wanted, offset)
        if len(first) == wanted:
            return first
        parts = [first]
        have = len(first)
        while have < wanted and parts[-1]:
            parts.append(os.pread(self._descriptor, wanted - have, offset + have))
            have += len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
