"""What is fuzzed. A target takes any bytes and returns, or raises what nobody promised: that is a finding.

The first bytes of an input choose (a pair of files, types, a coder), the others are what the reader gets, so that
coverage goes beyond magic numbers and digests. Seeds are valid inputs, made by the codec itself.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import delta
from common.artifact.parts import decode_index, encode_index
from common.artifact.protobuf import Span
from common.artifact.samples import decode_samples, encode_samples
from common.artifact.source import BytesSource
from common.artifact.weights import ELEMENT_BITS, Weight, external_weights, weights
from common.delta import frames
from common.delta.layout import ABSENT, PREFIXED, RAW, SPARSE
from common.delta.tensors import (
    NO_BASE,
    ZSTD,
    Block,
    DType,
    Memory,
    Method,
    decode,
)
from common.delta.tensors.coders import TOKENS
from common.delta.tensors.framing import part
from common.delta.tensors.low_rank import Known
from common.delta.varint import varint
from common.errors import IntegrityFailure
from tests.fuzz import seeds
from tests.patch_pairs import Pair, pairs
from tests.patches import header, reference_to

REGRESSIONS = Path(__file__).parent / "regressions"
OUTPUT_BYTES_MAX = 16 * 1024 * 1024
"""A patch whose target nobody has ordered may write as much as it likes; the disk of whoever applies it ends that."""
FILE_BYTES = 1 << 40
"""Of a data file that is only spoken of."""


class Target(NamedTuple):
    """`run` takes any bytes; `seeds` are some that are valid."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterator[bytes]]


class DiskFull(Exception):
    """The output became too long for whoever wanted it."""


def fuzzed(run: Callable[[bytes], None], data: bytes) -> None:
    """One run. A warning is a finding too: numpy warns where machines may compute different things."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with contextlib.suppress(IntegrityFailure):
            run(data)


def _apply(data: bytes) -> None:
    """A pair, then what follows the header of a patch for that pair."""
    pair, body = _pair(data)
    patch = header(pair.base, pair.target, pair.codec) + body
    made = delta.apply(BytesSource(pair.base), BytesSource(patch), len, target=reference_to(pair.target))
    assert made == reference_to(pair.target)


def _apply_raw(data: bytes) -> None:
    """A pair, then a whole patch for its base. No target was ordered."""
    pair, patch = _pair(data)
    left = OUTPUT_BYTES_MAX

    def sink(piece: bytes) -> None:
        nonlocal left
        left -= len(piece)
        if left < 0:
            raise DiskFull

    with contextlib.suppress(DiskFull):
        delta.apply(BytesSource(pair.base), BytesSource(patch), sink, target=None)


def _apply_streams(data: bytes) -> None:
    """A pair, flags, the lengths of three streams and of what packed differences stand for (two bytes each), and the
    streams. They are put into frames as the flags want it, so that what is in frames is mutated and not only frames
    are broken.
    """
    if len(data) < 10:
        return
    lengths = [int.from_bytes(data[at : at + 2], "little") for at in (2, 4, 6, 8)]
    streams, place = [], 10
    for length in (*lengths[:3], len(data)):
        streams.append(data[place : place + length])
        place += length
    pair, _ = _pair(data)
    _apply(data[:1] + _section(data[1], streams, lengths[3], pair.base))


def _inspect(data: bytes) -> None:
    """A pair, then what follows the header; the target is taken for one tensor of bytes."""
    pair, body = _pair(data)
    size = len(pair.target)
    tensor = Weight("w", "I8", (size,), Span(0, size))
    summary = delta.inspect(BytesSource(header(pair.base, pair.target, pair.codec) + body), (tensor,))
    assert sum(each.output_bytes for each in summary.operations) == size
    assert sum(each.patch_bytes for each in summary.operations) == summary.patch_bytes


def _inspect_raw(data: bytes) -> None:
    delta.inspect(BytesSource(data))


def _decode(data: bytes) -> None:
    """Method, types as in a patch, coder and whether a factor is known, rows and columns of two bytes; the payload."""
    if len(data) < 7:
        return
    try:
        method, dtype = Method(data[0]), DType(data[1] & 15)
        old_dtype = None if data[1] >> 4 == NO_BASE else DType(data[1] >> 4)
    except ValueError:
        return
    rows, columns = (int.from_bytes(data[at : at + 2], "little") for at in (3, 5))
    geometry = Block(dtype, old_dtype, rows * columns, columns)
    geometry.check()
    memory = Memory()
    if data[2] & 2:
        memory.known = Known(seeds.COLUMNS[:, :columns], data[2] >> 2)
    new = decode(
        method, seeds.old_elements(geometry), geometry, data[7:], seeds.CODERS[data[2] % len(seeds.CODERS)], memory
    )
    assert (len(new), new.dtype) == (geometry.count, dtype.bits)


def _integers(data: bytes) -> None:
    """Coder, width and form, a number of integers (two bytes), and a stream; that of tokens is put into its frame."""
    if len(data) < 3:
        return
    coder, dtype = seeds.CODERS[data[0] % len(seeds.CODERS)], np.dtype(f"<u{1 << (data[0] >> 1 & 3)}")
    count, stream = int.from_bytes(data[1:3], "little"), data[3:]
    if data[0] & 8:
        coder, form = ZSTD, TOKENS << 2 | (data[0] >> 4 & 3)
        stream = bytes([form]) + part(frames.compress(stream[:count], level=1)) + stream[count:]
    values = coder.unpack(stream, count, dtype)
    assert (len(values), values.dtype) == (count, dtype)


def _weights(data: bytes) -> None:
    source = BytesSource(data)
    for found, size in ((weights(source), len(data)), (external_weights(source, "w.bin", FILE_BYTES), FILE_BYTES)):
        end = 0
        for weight in found:
            assert end <= weight.span.start < weight.span.end <= size
            assert weight.kind in ELEMENT_BITS
            end = weight.span.end


def _parts(data: bytes) -> None:
    """The size of the file (eight bytes), and an index of it."""
    size = int.from_bytes(data[:8], "little")
    index = decode_index(data[8:], size)
    assert sum(part.size for part in index) == size
    assert decode_index(encode_index(index), size) == index


def _samples(data: bytes) -> None:
    """Samples of a self-test. What is read is written and read again as the same."""
    encoded = encode_samples(decode_samples(data))
    assert encode_samples(decode_samples(encoded)) == encoded


def _pair(data: bytes) -> tuple[Pair, bytes]:
    return pairs()[data[0] % len(pairs()) if data else 0], data[1:]


def _section(flags: int, streams: list[bytes], unpacked: int, prefix: bytes) -> bytes:
    """A section of `streams`, each as it is, in a frame, in one after `prefix` or as packed differences."""
    sizes, stored = b"", b""
    for index, stream in enumerate(streams):
        kind = flags >> 2 * index & 3
        frame = frames.compress(stream, prefix=prefix if (index, kind) == (1, PREFIXED) else b"", level=1)
        if kind != ABSENT:
            sizes += varint(unpacked) if (index, kind) == (2, SPARSE) else b""
            sizes += varint(len(stream)) + (b"" if kind == RAW else varint(len(frame)))
            stored += stream if kind == RAW else frame
    return bytes([flags]) + sizes + stored


TARGETS = {
    "apply": Target(_apply, seeds.bodies),
    "apply-streams": Target(_apply_streams, seeds.streams),
    "apply-raw": Target(_apply_raw, seeds.patches_of_pairs),
    "inspect": Target(_inspect, seeds.bodies),
    "inspect-raw": Target(_inspect_raw, seeds.patches),
    "decode": Target(_decode, seeds.payloads),
    "integers": Target(_integers, seeds.integer_streams),
    "weights": Target(_weights, seeds.models),
    "parts": Target(_parts, seeds.indexes),
    "samples": Target(_samples, seeds.samples),
}


def kept(name: str) -> dict[str, bytes]:
    """Inputs that once broke the target, by what was wrong."""
    inputs = {path.stem: path.read_bytes() for path in sorted(REGRESSIONS.glob("*.bin"))}
    return {stem: data for stem, data in inputs.items() if _target_of(stem) == name}


def _target_of(stem: str) -> str:
    return max((name for name in TARGETS if stem.startswith(f"{name}-")), key=len)
