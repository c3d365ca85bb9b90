"""Who runs on a data folder: one agent at a time, and where it answers.

`agent.lock` is locked (flock) by whoever works on the folder, so the kernel frees it however that program ends; it
holds the process id, for people. `run.json` says where the running agent answers; it may be left over from one that was
killed, so it is believed only while the lock is held.
"""

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from common.durable import make_folder, remove, write_file
from common.errors import Conflict, InvalidInput, StorageFull
from common.ids import DeviceId

logger = logging.getLogger(__name__)

LOCK_FILE = "agent.lock"
RUN_FILE = "run.json"
FOLDER_MODE = 0o700
LOCK_WAIT_S = 1.0
LOCK_POLL_S = 0.05


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A running agent; also what `--ready-file` gets."""

    device: DeviceId
    pid: int
    inference_url: str
    started_at: float


def become_owner(data: Path) -> None:
    """As root, go on as the user who owns the data folder, so that no file in it becomes root's.

    The service runs as a user of its own; `sudo ferry-agent join` must leave it files that it can read. Nothing happens
    to anybody else, or while there is no folder.
    """
    if os.geteuid() != 0 or not data.is_dir():
        return
    owner = data.stat()
    if owner.st_uid != 0:
        os.setgroups([owner.st_gid])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)


@contextlib.contextmanager
def sole_user(data: Path) -> Iterator[None]:
    """Hold the data folder (made if need be) for the block; `Conflict` while another program does."""
    try:
        make_folder(data, FOLDER_MODE)
        descriptor = _lock_file(data / LOCK_FILE)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        fix = "choose a folder that this user can write, with --data"
        raise InvalidInput(f"cannot write to {data}: {error.strerror}", field="data", fix=fix) from error
    with os.fdopen(descriptor, "r") as lock:
        _lock(lock, data)
        with contextlib.suppress(OSError):  # for people only: a full or read-only disk keeps nobody from running
            (data / LOCK_FILE).write_text(f"{os.getpid()}\n", encoding="ascii")
        yield


def _lock_file(path: Path) -> int:
    """The lock file, made if need be; read only where the disk is."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _lock(lock: IO[str], data: Path) -> None:
    """Take the lock, waiting a moment: `find_run` holds it for an instant, and an old agent may be on its way out."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                fix = "stop it first, or use another --data folder"
                raise Conflict(f"an agent (process {lock.read().strip() or '?'}) uses {data}", fix=fix) from error
        time.sleep(LOCK_POLL_S)


@contextlib.contextmanager
def announced(data: Path, run: Run, ready_file: Path | None) -> Iterator[None]:
    """Tell where the agent answers, for the time of the block."""
    files = [data / RUN_FILE, *([ready_file] if ready_file else [])]
    for file in files:
        _try_to(lambda file=file: write_file(file, msgspec.json.encode(run)))  # type: ignore[misc]  # a lambda's default
    try:
        yield
    finally:
        for file in files:
            _try_to(lambda file=file: remove(file))  # type: ignore[misc]


def _try_to(work: Callable[[], None]) -> None:
    """Where the agent answers is worth telling, but it answers all the same."""
    try:
        work()
    except (StorageFull, OSError) as error:
        logger.warning("cannot tell where the agent answers", extra={"reason": str(error)})


def find_run(data: Path) -> Run | None:
    """The agent that runs on the folder now, if one does."""
    try:
        with (data / LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            return msgspec.json.decode((data / RUN_FILE).read_bytes(), type=Run)
    except FileNotFoundError:
        pass
    return None
