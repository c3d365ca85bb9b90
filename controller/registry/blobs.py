"""Blobs in a folder: files named by the SHA-256 of their bytes, written once, never changed.

    blobs/sha256/4f/4fd0...    a complete, verified file
    blobs/incoming/            unfinished ones; emptied at start, for whoever wrote them is gone

A blob gets its final name only after its bytes were checked against that name and are on the disk, so a file that is
there under its name is whole. Whether anybody needs it is for the store to say. A file that the disk has damaged is
mended by removing it and uploading it again. One program writes to the folder at a time.
"""

import asyncio
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from common.artifact.digest import Hasher, hex_of
from common.artifact.manifest import ArtifactRef
from common.durable import commit_file, explaining_full_disk, fsync_folder
from common.errors import InvalidInput, NotFound, TooLarge
from common.ids import DIGEST, Digest, parse_digest

FOLDER_DIGITS = 2
"""Leading hex digits that name the sub-folder: 256 of them keep each one small."""
WRITE_BYTES = 1024 * 1024
"""How much of an upload is gathered in memory before a thread writes and hashes it."""


class StoredBlob(msgspec.Struct, frozen=True):
    """A blob in the folder; `arrived_at` is when its bytes were written (Unix seconds)."""

    artifact: ArtifactRef
    arrived_at: float


class Draft:
    """A file on its way to becoming a blob: written, hashed, then committed under its digest or thrown away.

    Not committed when the `with` block ends, for whatever reason: nothing is kept. A thread may still be writing when
    the task that sent it is cancelled; the lock keeps the descriptor open until it is done, because a number that was
    closed under it could belong to another file by then.
    """

    def __init__(self, blobs: "LocalBlobs", path: Path) -> None:
        self.path = path
        self._blobs = blobs
        self._hasher = Hasher()
        self._file = path.open("wb", buffering=0)
        self._busy = threading.Lock()

    def write(self, data: bytes | bytearray) -> None:
        """Append; `StorageFull` when the disk has no room."""
        with self._busy, explaining_full_disk(self.path):
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            self._hasher.update(data)

    @property
    def artifact(self) -> ArtifactRef:
        """What was written so far."""
        return ArtifactRef(self._hasher.digest(), self._hasher.size)

    def commit(self) -> ArtifactRef:
        """Make it a blob, durably."""
        with self._busy, explaining_full_disk(self.path):
            os.fsync(self._file.fileno())
            self._blobs.adopt(self.path, self.artifact)
            return self.artifact

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._busy:
            self._file.close()
            self.path.unlink(missing_ok=True)


class LocalBlobs:
    """The blobs in `folder`, which is made if it is not there. Making one empties `incoming`.

    `changing` is held by whoever moves a blob and its row in the store together (an upload's last step, garbage
    collection), so that a blob is never taken away between being found and being referred to.
    """

    def __init__(self, folder: Path) -> None:
        self.changing = asyncio.Lock()
        self._folder = folder / "sha256"
        self._incoming = folder / "incoming"
        for needed in (self._folder, self._incoming):
            needed.mkdir(parents=True, exist_ok=True)
        for left_over in self._incoming.iterdir():
            left_over.unlink()
        fsync_folder(folder)

    async def put(self, digest: Digest, chunks: AsyncIterator[bytes], size_max: int) -> ArtifactRef:
        """Keep the bytes of `chunks`, which must hash to `digest` and be at most `size_max` bytes.

        Streams: memory does not grow with the size. If the blob is there, the chunks are not read. Raises `TooLarge`,
        `InvalidInput` (digest), `StorageFull`; nothing is kept then, nor when the caller is cancelled.
        """
        there = self.find(parse_digest(digest))
        if there is not None:
            return there
        with self.draft() as draft:
            await _write_all(draft, chunks, size_max)
            if draft.artifact.digest != digest:
                fix = "the upload was cut short or changed on the way: send the file again with its own digest"
                raise InvalidInput(f"the bytes hash to {draft.artifact.digest}", field="digest", fix=fix)
            return await asyncio.to_thread(draft.commit)

    def put_bytes(self, data: bytes) -> ArtifactRef:
        """Keep `data` under its own digest. Blocks for an fsync; `StorageFull` when there is no room."""
        with self.draft() as draft:
            draft.write(data)
            return self.find(draft.artifact.digest) or draft.commit()

    def path(self, digest: Digest) -> Path | None:
        """Where the blob is, for reading only, or None."""
        path = self._place(digest)
        return path if path.is_file() else None

    def find(self, digest: Digest) -> ArtifactRef | None:
        """Name and size of the blob if it is there."""
        try:
            return ArtifactRef(digest, self._place(digest).stat().st_size)
        except FileNotFoundError:
            return None

    def read(self, digest: Digest, offset: int, length: int) -> bytes:
        """The `length` bytes from `offset` on, fewer at the end; `NotFound` if there is no such blob."""
        try:
            with self._place(digest).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), length, offset)
        except FileNotFoundError as error:
            raise NotFound(f"no blob {digest}", field="digest") from error

    def remove(self, digest: Digest) -> None:
        """Take the blob away if it is there. Whoever has it open keeps reading it."""
        self._place(digest).unlink(missing_ok=True)

    def all(self) -> Iterator[StoredBlob]:
        """Every blob, in no particular order."""
        for path in self._folder.glob("*/*"):
            digest = f"sha256:{path.name}"
            if DIGEST.fullmatch(digest):
                status = path.stat()
                yield StoredBlob(ArtifactRef(Digest(digest), status.st_size), status.st_mtime)

    def draft(self) -> Draft:
        """A new, empty file in `incoming`, to be used in a `with` statement."""
        return Draft(self, self.incoming_path())

    def incoming_path(self) -> Path:
        """A new, empty file in `incoming` for somebody else to write; hand it to `adopt` or unlink it."""
        with explaining_full_disk(self._incoming / "new"):
            descriptor, name = tempfile.mkstemp(dir=self._incoming)
            os.close(descriptor)
        return Path(name)

    def adopt(self, path: Path, artifact: ArtifactRef) -> None:
        """Give a finished, fsynced file from `incoming`, whose bytes were hashed to `artifact`, its name."""
        place = self._place(artifact.digest)
        with explaining_full_disk(place):
            if not place.parent.is_dir():
                place.parent.mkdir(exist_ok=True)
                fsync_folder(self._folder)
            commit_file(path, place)

    def _place(self, digest: Digest) -> Path:
        name = hex_of(parse_digest(digest))
        return self._folder / name[:FOLDER_DIGITS] / name


async def _write_all(draft: Draft, chunks: AsyncIterator[bytes], size_max: int) -> None:
    """Gather small chunks, so that a thread is bothered once per `WRITE_BYTES` and the event loop never waits."""
    gathered = bytearray()
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > size_max:
            raise TooLarge("the blob is too large", field="body", fix=f"at most {size_max} bytes are accepted")
        gathered += chunk
        if len(gathered) >= WRITE_BYTES:
            await asyncio.to_thread(draft.write, gathered)
            gathered = bytearray()
    await asyncio.to_thread(draft.write, gathered)
