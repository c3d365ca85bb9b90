"""Applying a patch: the base, changed operation by operation into the target. Believes nothing that the patch says.

Memory is bounded whatever the size of the model: one piece of 1 MiB, one section's streams, one tensor block and what
its decoding needs, or the window and prefix of one frame.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from common.artifact.digest import Hasher
from common.artifact.manifest import ArtifactRef
from common.artifact.protobuf import Span
from common.artifact.source import ByteSource, digest_of_source, pieces
from common.delta import frames
from common.delta.codecs import coder_for_reading
from common.delta.layout import Header, fingerprint, gathered, read_header
from common.delta.operations import Add, Copy, Literal, TensorBlock, old_bytes
from common.delta.reading import Frame, Placed, read
from common.delta.tensors import Memory, decode
from common.errors import IntegrityFailure

FRAME_PIECE_BYTES = 64 * 1024
"""How much of a frame is read at a time."""


def apply(
    base: ByteSource, patch: ByteSource, sink: Callable[[bytes], object], *, target: ArtifactRef | None
) -> ArtifactRef:
    """Write the target of `patch` to `sink`, in order, in pieces of at most 1 MiB; returns its name.

    `target` is what it must be; with None, for a person who trusts the patch, it need only fit what the patch says.

    `IntegrityFailure` when the patch is not for `base` and `target`, is damaged, needs a codec that this machine lacks,
    or gives other bytes than `target` names. What was written to `sink` before a failure must be thrown away.
    """
    header, place = read_header(patch)
    if target is not None and not header.target.fits(target):
        raise IntegrityFailure(f"the patch makes {header.target}, expected {target.digest}, {target.size} bytes")
    _check_base(base, header)
    hasher = Hasher()
    for piece in _target(base, patch, header, place):
        hasher.update(piece)
        sink(piece)
    made = ArtifactRef(hasher.digest(), hasher.size)
    if made != target if target is not None else not header.target.fits(made):
        raise IntegrityFailure(f"the patch gave {made.digest}, not {header.target}", fix="fetch it again")
    return made


def _check_base(base: ByteSource, header: Header) -> None:
    if base.size != header.base.size or fingerprint(ArtifactRef(digest_of_source(base), base.size)) != header.base:
        fix = "use the base that the patch was made from"
        raise IntegrityFailure(f"the base is not {header.base}, from which the patch starts", fix=fix)


def _target(base: ByteSource, patch: ByteSource, header: Header, place: int) -> Iterator[bytes]:
    coder, memory = coder_for_reading(header.codec), Memory()
    for step in read(patch, header, place, base.read_at):
        if not isinstance(step, Placed):
            continue
        match step.operation:
            case Copy(offset, length):
                yield from pieces(base, offset, offset + length)
            case Literal(data):
                yield data
            case Add(offset, differences):
                yield from _added(pieces(base, offset, offset + len(differences)), np.frombuffer(differences, np.uint8))
            case TensorBlock(offset, block, method, payload):
                elements = None
                if block.old_dtype is not None:
                    elements = np.frombuffer(base.read_at(offset, old_bytes(block)), block.old_dtype.bits)
                yield decode(method, elements, block, payload, coder, memory).tobytes()
            case Frame() as frame:
                stored = _span(patch, frame.span)
                yield from frames.stream(stored, frame.length, prefix=gathered(base.read_at, frame.prefix))


def _added(old: Iterable[bytes], differences: NDArray[np.uint8]) -> Iterator[bytes]:
    place = 0
    for piece in old:
        yield (np.frombuffer(piece, np.uint8) + differences[place : place + len(piece)]).tobytes()
        place += len(piece)


def _span(patch: ByteSource, span: Span) -> Iterator[bytes]:
    for place in range(span.start, span.end, FRAME_PIECE_BYTES):
        yield patch.read_at(place, min(FRAME_PIECE_BYTES, span.end - place))
