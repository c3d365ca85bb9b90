"""A FUSE file system that hands everything on to a folder and writes down what is changed, in order.

`python -m tests.crash.recording FOLDER MOUNT RECORD` is the file system's process: a program that waited for a file
system in its own process could wait for itself. `Recorder` starts it, gives out run folders and reads the record.
A folder whose name begins with `@` is not made: its name is a mark in the record. The marks `fail=EROFS`, `fail=ENOSPC`
and `fail=EIO` let the disk refuse from then on what such a disk refuses, and `lose=FOLDER:NAME` makes that file
unreadable; `fail=` and `lose=` heal it.
"""

import contextlib
import ctypes.util
import errno
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec

from tests.crash.disk import Op

MARK = "@"
FAIL = "fail="
LOSE = "lose="
START_S = 20.0
PAGE_BYTES = 4096
WRITE_BYTES_MAX = 128 * 1024
_LENGTH = struct.Struct("<I")


def available() -> str:
    """Why there is no FUSE here; empty if there is."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse that this user may open"
    if not (ctypes.util.find_library("fuse3") or ctypes.util.find_library("fuse")):
        return "libfuse is not installed (Debian: fuse3)"
    try:
        import mfusepy  # noqa: F401
    except ImportError:
        return "mfusepy is not installed (pip install -e '.[dev]')"
    return ""


class Run(NamedTuple):
    """A folder: `recorded` in the file system, and `behind` it, where nothing is written down."""

    name: str
    recorded: Path
    behind: Path


class Recorder:
    """A mounted recording file system below `folder`; runs are folders in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "behind"
        self._mount = folder / "mount"
        self._record = folder / "record"
        self._process: subprocess.Popen[bytes] | None = None
        self._read = 0
        self._runs = 0
        for made in (self._folder, self._mount):
            made.mkdir(parents=True)

    def __enter__(self) -> Self:
        command = [
            sys.executable,
            "-m",
            "tests.crash.recording",
            str(self._folder),
            str(self._mount),
            str(self._record),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)  # its end is the sign that we are gone
        deadline = time.monotonic() + START_S
        while not os.path.ismount(self._mount):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the recording file system did not start")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        unmount(self._mount)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()

    def run(self) -> "Run":
        """A new folder in the file system."""
        self._runs += 1
        name = f"run{self._runs}"
        (self._folder / name).mkdir()
        return Run(name, self._mount / name, self._folder / name)

    def ops(self, name: str) -> list[Op]:
        """What has been done in the run `name`, and nowhere else, since the last call."""
        found: list[Op] = []
        prefix = f"{name}/"
        with self._record.open("rb") as record:
            record.seek(self._read)
            while head := record.read(_LENGTH.size):
                op = msgspec.msgpack.decode(record.read(_LENGTH.unpack(head)[0]), type=Op)
                if op.path.startswith(prefix) or op.path == name:
                    found.append(
                        msgspec.structs.replace(
                            op, path=op.path.removeprefix(name).lstrip("/"), to=op.to.removeprefix(prefix)
                        )
                    )
            self._read = record.tell()
        return _whole(found)


def _whole(ops: list[Op]) -> list[Op]:
    """Writes as programs made them: the kernel cuts those that cross a page into several."""
    whole: list[Op] = []
    for op in ops:
        last = whole[-1] if whole else None
        if last and last.kind == op.kind == "write" and last.path == op.path and len(last.data) < WRITE_BYTES_MAX:
            end = last.offset + len(last.data)
            if end == op.offset and end % PAGE_BYTES == 0:
                whole[-1] = msgspec.structs.replace(last, data=last.data + op.data)
                continue
        whole.append(op)
    return whole


def main(folder: str, mount: str, record: str) -> None:
    """Serve until unmounted."""
    import mfusepy

    class FileSystem(mfusepy.Operations):  # type: ignore[misc]  # mfusepy has no types
        use_ns = True

        def __init__(self) -> None:
            self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            self._error = 0
            self._lost = ""

        def _refuse(self, *errors: int) -> None:
            """Fail as the disk does now, if it is with one of `errors`."""
            if self._error in errors:
                raise mfusepy.FuseOSError(self._error)

        def _at(self, path: str) -> Path:
            return Path(folder + path)

        def _done(self, kind: str, path: str, to: str = "", offset: int = 0, data: bytes = b"") -> None:
            frame = msgspec.msgpack.encode(Op(kind, path.lstrip("/"), to.lstrip("/"), offset, data))
            os.write(self._record, _LENGTH.pack(len(frame)) + frame)

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            found = os.lstat(self._at(path))
            keys = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino")
            times = {f"st_{kind}": getattr(found, f"st_{kind}_ns") for kind in ("atime", "mtime", "ctime")}
            return {key: getattr(found, key) for key in keys} | times

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *(entry.name for entry in self._at(path).iterdir())]

        def statfs(self, path: str) -> dict[str, int]:
            found = os.statvfs(self._at(path))
            keys = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_files", "f_ffree", "f_frsize", "f_namemax")
            return {key: getattr(found, key) for key in keys}

        def open(self, path: str, flags: int) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                self._refuse(errno.EROFS)
            return os.open(self._at(path), flags & ~(os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_TRUNC))

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            self._refuse(errno.EROFS, errno.ENOSPC, errno.EIO)
            handle = os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            self._done("create", path)
            return handle

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            if self._lost and path.endswith(f"/{self._lost}"):
                raise mfusepy.FuseOSError(errno.EIO)
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            self._refuse(errno.EROFS, errno.ENOSPC, errno.EIO)
            written = os.pwrite(fh, data, offset)
            self._done("write", path, offset=offset, data=bytes(data[:written]))
            return written

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            self._refuse(errno.EROFS, errno.EIO)
            os.truncate(self._at(path) if fh is None else fh, length)
            self._done("truncate", path, offset=length)
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            self._refuse(errno.EIO)
            self._done("fsync", path)
            return 0

        def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
            self._refuse(errno.EIO)
            self._done("fsyncdir", path)
            return 0

        def flush(self, path: str, fh: int) -> int:
            return 0

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

        def rename(self, old: str, new: str) -> int:
            self._refuse(errno.EROFS, errno.EIO)
            self._at(old).rename(self._at(new))
            self._done("rename", old, new)
            return 0

        def link(self, target: str, source: str) -> int:
            self._refuse(errno.EROFS, errno.ENOSPC, errno.EIO)
            os.link(self._at(source), self._at(target))
            self._done("link", source, target)
            return 0

        def unlink(self, path: str) -> int:
            self._refuse(errno.EROFS, errno.EIO)
            self._at(path).unlink()
            self._done("unlink", path)
            return 0

        def mkdir(self, path: str, mode: int) -> int:
            if (name := path.rpartition("/")[2]).startswith(MARK):
                self._mark(path, name.removeprefix(MARK))
                raise mfusepy.FuseOSError(errno.EEXIST)
            self._refuse(errno.EROFS, errno.ENOSPC, errno.EIO)
            self._at(path).mkdir(mode)
            self._done("mkdir", path)
            return 0

        def _mark(self, path: str, text: str) -> None:
            if text.startswith(LOSE):
                self._lost = text.removeprefix(LOSE).replace(":", "/")
            if text.startswith(FAIL):
                self._error = getattr(errno, text.removeprefix(FAIL), 0)
            self._done("mark", f"{path.strip('/').partition('/')[0]}/{text}")

        def rmdir(self, path: str) -> int:
            self._refuse(errno.EROFS, errno.EIO)
            self._at(path).rmdir()
            self._done("rmdir", path)
            return 0

        def chmod(self, path: str, mode: int) -> int:
            self._at(path).chmod(mode)
            return 0

        def utimens(self, path: str, times: Any = None) -> int:
            return 0

    def end_with_the_parent() -> None:
        while os.read(0, 1):
            pass
        unmount(Path(mount))

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    mfusepy.FUSE(FileSystem(), mount, foreground=True, nothreads=True)


def unmount(folder: Path) -> None:
    """Take the file system away, whoever still has a file of it open."""
    subprocess.run(["fusermount3", "-u", "-z", "-q", str(folder)], check=False)


def mark(run: Path, text: str) -> None:
    """Write `text` into the record of the run."""
    with contextlib.suppress(FileExistsError):
        (run / f"{MARK}{text}").mkdir()


if __name__ == "__main__":
    main(*sys.argv[1:])
