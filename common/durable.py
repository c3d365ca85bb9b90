"""The one way to write a file: temporary file in the same folder, fsync, rename, fsync the folder.

After a crash a reader finds the old content or the new, never a mixture, and what was announced as written is on the
disk. Everything in both programs that keeps a file goes through here; on the device nothing else changes the disk but
SQLite (a test holds that), which has rules of its own. A full disk is `StorageFull`, told apart from other OS errors,
because it is the one an operator can mend.

Moving, linking and removing are durable only after `fsync_folder`: whoever does several of them syncs once.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import StorageFull

PRIVATE_MODE = 0o600
SHARED_MODE = 0o644
FOLDER_MODE = 0o777
"""Before the umask."""


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


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write in pieces in a folder that has no name yet that anybody reads: on the disk when the block ends.

    Its name is not; the folder's maker syncs that.
    """
    with explaining_full_disk(path), path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def scratch_file(path: Path) -> Iterator[BinaryIO]:
    """A file for the time of the block, which need not survive anything; close it before it is read."""
    try:
        with explaining_full_disk(path), path.open("wb") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def flush_file(path: Path) -> None:
    """Bring to the disk what somebody else (a library) has written into the file at `path`."""
    with explaining_full_disk(path), path.open("rb") as file:
        os.fsync(file.fileno())


class GrowingFile:
    """A private file that only grows at its end, made if need be; what is written is on the disk after `sync`.

    Its name is durable after the first `sync`. Raises `StorageFull`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._named = False
        with explaining_full_disk(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_MODE)
        self.size = os.fstat(self._descriptor).st_size

    def append(self, block: bytes) -> None:
        """Write all of `block`; after an error `size` tells how much of it there is."""
        view = memoryview(block)
        with explaining_full_disk(self._path):
            while view:
                written = os.pwrite(self._descriptor, view, self.size)
                self.size += written
                view = view[written:]

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes."""
        os.ftruncate(self._descriptor, size)
        self.size = size

    def sync(self) -> None:
        """Bring it to the disk."""
        with explaining_full_disk(self._path):
            os.fsync(self._descriptor)
            if not self._named:
                fsync_folder(self._path.parent)
                self._named = True

    def close(self) -> None:
        """Let it go."""
        os.close(self._descriptor)


def make_folder(folder: Path, mode: int = FOLDER_MODE) -> None:
    """Make `folder`, and what is missing above it, durably; what is there stays as it is."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode, exist_ok=True)
        fsync_folder(folder.parent)


def move(old: Path, new: Path) -> None:
    """Give a file or folder another name; a file of that name is replaced, a folder must be empty or not there."""
    old.rename(new)


def link_or_move(old: Path, new: Path) -> None:
    """A second name for a file; on a file system without hard links, another name."""
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.EMLINK}:
            raise
        move(old, new)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
