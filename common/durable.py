"""The one way to write a file: temporary file in the same folder, fsync, rename, fsync the folder.

After a crash a reader finds the old content or the new, never a mixture, and what was announced as written is on the
disk. Everything in both programs that keeps a file goes through here. A full disk is `StorageFull`, told apart from
other OS errors, because it is the one an operator can mend.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import StorageFull

PRIVATE_MODE = 0o600
SHARED_MODE = 0o644


def write_file(path: Path, data: bytes, mode: int = SHARED_MODE) -> None:
    """Replace the file at `path` by `data`, all or nothing.

    Raises `StorageFull` when the disk or quota is full; the old file is then untouched.
    """
    with replacing(path, mode) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path, mode: int = SHARED_MODE) -> Iterator[BinaryIO]:
    """A file to write in pieces, which becomes `path` when the block ends well and is gone otherwise.

    Raises `StorageFull` as `write_file` does, and the `OSError` of a folder that does not exist or may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explaining_full_disk(path):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            commit_file(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def commit_file(temporary: Path, path: Path) -> None:
    """Give a finished, fsynced `temporary` its final name, durably. Both must be on one file system."""
    temporary.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames, creations and removals inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explaining_full_disk(path: Path) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT inside the block into `StorageFull`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            message = f"no room left on the disk that holds {path.parent}"
            raise StorageFull(message, fix="free some space or move the data folder; nothing was lost") from error
        raise
