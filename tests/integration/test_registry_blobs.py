"""Blobs: what is there under its name is whole, and what went wrong leaves nothing."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from common.artifact.digest import digest_of
from common.artifact.manifest import ArtifactRef
from common.errors import InvalidInput, NotFound, StorageFull, TooLarge
from common.ids import Digest
from controller.registry.blobs import LocalBlobs

SIZE_MAX = 64 * 1024 * 1024
HELLO = b"hello, device"
NAME = digest_of(HELLO)


async def stream(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(0)
        yield part


async def broken_off(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    raise ConnectionResetError("the client went away")


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path)


async def test_a_model_is_kept_under_its_digest(blobs: LocalBlobs, real_models: tuple[Path, Path]) -> None:
    model = await asyncio.to_thread(real_models[0].read_bytes)
    pieces = (model[start : start + 10_000] for start in range(0, len(model), 10_000))
    artifact = await blobs.put(digest_of(model), stream(pieces), SIZE_MAX)
    assert artifact == ArtifactRef(digest_of(model), len(model))
    path = blobs.path(artifact.digest)
    assert path is not None
    assert await asyncio.to_thread(path.read_bytes) == model


async def test_memory_does_not_grow_with_the_upload(blobs: LocalBlobs) -> None:
    piece, count = bytes(256 * 1024), 160
    name = digest_of(piece * count)
    tracemalloc.start()
    try:
        await blobs.put(name, stream(piece for _ in range(count)), SIZE_MAX)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 1024 * 1024 < len(piece) * count


async def test_an_empty_blob_is_a_blob(blobs: LocalBlobs) -> None:
    assert await blobs.put(digest_of(b""), stream([]), SIZE_MAX) == ArtifactRef(digest_of(b""), 0)


@pytest.mark.parametrize("sent", [HELLO[:-1], HELLO + b"!", b"", b"HELLO, device"])
async def test_bytes_that_are_not_what_they_claim_are_refused(blobs: LocalBlobs, tmp_path: Path, sent: bytes) -> None:
    with pytest.raises(InvalidInput) as refused:
        await blobs.put(NAME, stream([sent]), SIZE_MAX)
    assert refused.value.field == "digest"
    assert digest_of(sent) in refused.value.message
    assert files_in(tmp_path) == []


async def test_a_name_that_is_no_digest_is_refused(blobs: LocalBlobs) -> None:
    for name in ("", "sha256:../../etc/passwd", "md5:" + "0" * 64, "sha256:" + "G" * 64):
        with pytest.raises(InvalidInput):
            await blobs.put(Digest(name), stream([HELLO]), SIZE_MAX)


async def test_an_upload_that_breaks_off_leaves_nothing(blobs: LocalBlobs, tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError):
        await blobs.put(NAME, broken_off([HELLO]), SIZE_MAX)
    assert files_in(tmp_path) == []
    assert await blobs.put(NAME, stream([HELLO]), SIZE_MAX) == ArtifactRef(NAME, len(HELLO))


async def test_a_cancelled_upload_leaves_nothing(blobs: LocalBlobs, tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield bytes(2 * 1024 * 1024)
        begun.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(blobs.put(NAME, slow(), SIZE_MAX))
    await begun.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert files_in(tmp_path) == []


async def test_an_upload_beyond_the_limit_is_stopped_where_it_passes_it(blobs: LocalBlobs, tmp_path: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield bytes(1000)

    with pytest.raises(TooLarge, match="5500 bytes"):
        await blobs.put(NAME, endless(), 5500)
    assert sent == 6000
    assert files_in(tmp_path) == []


async def test_what_is_there_is_not_read_again(blobs: LocalBlobs) -> None:
    first = await blobs.put(NAME, stream([HELLO]), SIZE_MAX)
    assert await blobs.put(NAME, broken_off([]), SIZE_MAX) == first


async def test_the_same_blob_may_arrive_twice_at_once(blobs: LocalBlobs, tmp_path: Path) -> None:
    uploads = (blobs.put(NAME, stream([HELLO[:3], HELLO[3:]]), SIZE_MAX) for _ in range(8))
    assert set(await asyncio.gather(*uploads)) == {ArtifactRef(NAME, len(HELLO))}
    assert len(files_in(tmp_path)) == 1


def test_unfinished_files_are_swept_at_start_and_finished_ones_stay(tmp_path: Path) -> None:
    before = LocalBlobs(tmp_path)
    before.put_bytes(HELLO)
    before.incoming_path().write_bytes(b"half of something")
    after = LocalBlobs(tmp_path)
    assert after.find(NAME) == ArtifactRef(NAME, len(HELLO))
    assert len(files_in(tmp_path)) == 1


def test_a_piece_is_read_from_anywhere_and_ends_where_the_blob_does(blobs: LocalBlobs) -> None:
    blobs.put_bytes(HELLO)
    for offset, length in ((0, 5), (7, 6), (7, 1000), (len(HELLO), 5), (1000, 1)):
        assert blobs.read(NAME, offset, length) == HELLO[offset : offset + length]
    with pytest.raises(NotFound):
        blobs.read(digest_of(b"nobody sent this"), 0, 1)


def test_removing_is_repeatable_and_leaves_the_others(blobs: LocalBlobs) -> None:
    kept = blobs.put_bytes(b"kept")
    blobs.put_bytes(HELLO)
    assert {blob.artifact.digest for blob in blobs.all()} == {NAME, kept.digest}
    for _ in range(2):
        blobs.remove(NAME)
    assert [blob.artifact for blob in blobs.all()] == [kept]
    assert blobs.path(NAME) is None and blobs.find(NAME) is None


class FullDisk(LocalBlobs):
    """Blobs on a disk that is full: the kernel's own, `/dev/full`."""

    def incoming_path(self) -> Path:
        path = super().incoming_path()
        path.unlink()
        path.symlink_to("/dev/full")
        return path


async def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    LocalBlobs(tmp_path).put_bytes(b"kept")
    blobs = FullDisk(tmp_path)
    with pytest.raises(StorageFull, match="no room left"):
        await blobs.put(NAME, stream([HELLO]), SIZE_MAX)
    with pytest.raises(StorageFull):
        blobs.put_bytes(HELLO)
    assert [path.name for path in files_in(tmp_path)] == [digest_of(b"kept").removeprefix("sha256:")]
