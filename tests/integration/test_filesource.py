"""A file read as a source behaves like the same bytes in memory, also from several threads and after a rename."""

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.artifact.digest import digest_of
from common.artifact.source import PIECE_BYTES, ByteSource, BytesSource, digest_of_source, pieces
from common.filesource import FileSource

DATA = os.urandom(5_000)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "data"
    path.write_bytes(DATA)
    return path


@given(offset=st.integers(0, 6_000), length=st.integers(0, 6_000))
def test_a_file_reads_like_memory(file: Path, offset: int, length: int) -> None:
    in_memory: ByteSource = BytesSource(DATA)
    with FileSource(file) as source:
        assert source.size == in_memory.size
        assert source.read_at(offset, length) == in_memory.read_at(offset, length) == DATA[offset : offset + length]


def test_an_open_source_keeps_showing_the_file_it_was_opened_on(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"old")
    with FileSource(path) as source:
        (tmp_path / "next").write_bytes(b"newer")
        (tmp_path / "next").replace(path)
        assert (source.size, source.read_at(0, 10)) == (3, b"old")


def test_several_threads_may_read_one_source(file: Path) -> None:
    wrong: list[int] = []
    with FileSource(file) as source:

        def read_all() -> None:
            wrong.extend(at for at in range(0, 5_000, 7) if source.read_at(at, 7) != DATA[at : at + 7])

        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_file_that_shrinks_under_a_reader_gives_fewer_bytes_and_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(DATA)
    with FileSource(path) as source:
        os.truncate(path, 100)
        assert source.read_at(50, 1_000) == DATA[50:100]


def test_a_missing_file_is_the_operating_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileSource(tmp_path / "none")


def test_pieces_cover_a_range_in_order() -> None:
    data = os.urandom(2 * PIECE_BYTES + 5)
    source = BytesSource(data)
    assert [len(piece) for piece in pieces(source)] == [PIECE_BYTES, PIECE_BYTES, 5]
    assert b"".join(pieces(source, 3, PIECE_BYTES + 9)) == data[3 : PIECE_BYTES + 9]
    passed: list[int] = []
    assert digest_of_source(source, passed.append) == digest_of(data)
    assert sum(passed) == len(data)
