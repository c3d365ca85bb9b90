"""The incremental way to a file: what a held file has of it is copied, the rest is fetched as byte ranges.

Two indexes (`common.artifact.parts`) say which is which. The ranges lie in one download, one after another, so it
resumes where it stopped; each part in it is checked by its own digest, the finished file by the order's.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from common.artifact import ArtifactRef
from common.artifact.parts import DIGEST_BYTES, INDEX_BYTES_MAX, Part, Stretch, assemble, decode_index
from common.artifact.protobuf import Span
from common.errors import IntegrityFailure
from common.filesource import FileSource
from common.wire import PartsOffer
from edge_agent.fetch import Ranges
from edge_agent.slots import BLOCK_BYTES, Sink, Slots


class Assembly(NamedTuple):
    """A file put together from `stretches`; `fetched` are the parts that come over the network, in order."""

    stretches: tuple[Stretch, ...]
    fetched: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """How many bytes must be fetched."""
        return sum(part.size for part in self.fetched)

    @property
    def ranges(self) -> Ranges:
        """What to fetch."""
        spans = (Span(stretch.start, stretch.end) for stretch in self.stretches if stretch.held is None)
        return Ranges(tuple(spans), self._are_in)

    def write(self, base: FileSource, fetched: Path, sink: Sink) -> None:
        """Feed the file to `sink`, from the base and from what was fetched."""
        with fetched.open("rb") as ranges:
            for stretch in self.stretches:
                length = stretch.end - stretch.start
                copied = _read_at(base, stretch.offset, length) if stretch.held is not None else _read(ranges, length)
                for block in copied:
                    sink(block)

    def _are_in(self, path: Path) -> bool:
        """Whether the file at `path` is the fetched parts and nothing else."""
        try:
            with path.open("rb") as file:
                sound = all(_digest(_read(file, part.size)) == part.digest for part in self.fetched)
                return sound and not file.read(1)
        except FileNotFoundError:
            return False


def read_assembly(slots: Slots, wanted: ArtifactRef, base: ArtifactRef, offer: PartsOffer) -> Assembly:
    """How `wanted` is made from `base`, by the two downloaded indexes. Raises `IntegrityFailure`."""
    held = _read_index(slots, offer.base_index, base)
    parts = _read_index(slots, offer.index, wanted)
    stretches = assemble([held], parts)
    return Assembly(stretches, tuple(_fetched(stretches, parts)))


def _fetched(stretches: tuple[Stretch, ...], parts: tuple[Part, ...]) -> Iterator[Part]:
    """The parts that lie in stretches to be fetched; a stretch begins and ends where parts do."""
    rest = iter(parts)
    for stretch in stretches:
        for part in rest:
            if stretch.held is None:
                yield part
            if part.end == stretch.end:
                break


def _read_index(slots: Slots, index: ArtifactRef, file: ArtifactRef) -> tuple[Part, ...]:
    if index.size > INDEX_BYTES_MAX:
        raise IntegrityFailure(f"an index of {index.size} bytes, the limit is {INDEX_BYTES_MAX}")
    return decode_index(slots.download_path(index.digest).read_bytes(), file.size)


def _read(file: IO[bytes], length: int) -> Iterator[bytes]:
    return _blocks(file.read, length)


def _read_at(source: FileSource, offset: int, length: int) -> Iterator[bytes]:
    for start in range(offset, offset + length, BLOCK_BYTES):
        yield source.read_at(start, min(BLOCK_BYTES, offset + length - start))


def _blocks(read: Callable[[int], bytes], length: int) -> Iterator[bytes]:
    while length and (block := read(min(BLOCK_BYTES, length))):
        yield block
        length -= len(block)


def _digest(blocks: Iterator[bytes]) -> bytes:
    state = hashlib.sha256()
    for block in blocks:
        state.update(block)
    return state.digest()[:DIGEST_BYTES]
