"""A file is replaced whole or not at all, and a full disk is told apart."""

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from common.durable import PRIVATE_MODE, explaining_full_disk, write_file
from common.errors import StorageFull

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from common.durable import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    write_file(Path(sys.argv[1]), b"x" * 4096)
except OSError as error:
    print(type(error).__name__, error.errno)
"""


def test_the_new_content_replaces_the_old_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_file(path, b"old")
    write_file(path, b"new", PRIVATE_MODE)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == PRIVATE_MODE
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_file(path, b"old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert str(errno.EFBIG) in done.stdout
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_storage_full_and_says_where(tmp_path: Path, code: int) -> None:
    with pytest.raises(StorageFull, match=str(tmp_path)), explaining_full_disk(tmp_path / "blob"):
        raise OSError(code, "full")


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), explaining_full_disk(tmp_path / "blob"):
        raise PermissionError(errno.EACCES, "no")
