"""Entropy coders: arrays of integers to bytes and back.

`PCO` is pcodec (Pcodec: Better Compression for Numerical Sequences, Loncaric et al., 2025), whose wrapped format is
used without its headers. `ZSTD` is for devices on which pcodec cannot be installed. Both take values modulo 2^n of the
array's width and write them in the fewest bytes that hold them as signed numbers. The reader says how many values it
wants; the stream has no say in what is allocated.

A stream of no values is empty. Any other begins with a byte `form << 2 | log2(width in bytes)`. The forms: 0 all values
are the same, one value follows; 1 the values follow, little-endian; 2 one chunk of pcodec in classic mode without delta
encoding, its metadata (the first byte, always zero, is left out) and its only page; 3 tokens and low bits; 4 (pcodec
only) noise: a byte `shift`, a multiple of 4, then a part with the values shifted right by that, in form 0, 1 or 2, then
the low bits as they are: the lowest byte of every value, the next byte of every value, and so on, and where four bits
are left over, those of two values in a byte, the first in its lower half. Where the low bits tell nothing, leaving them
out lets the model of the others be smaller.

Form 3: a value becomes a natural number by zigzag. Numbers below 8 are tokens themselves; a larger one of b bits is
token 4 (b - 2) + (the two bits below its highest), and its lowest b - 3 bits, which are close to noise, follow in
planes. First comes a part, the zstd frame of all tokens, a byte each; then plane j holds bit j of every number that has
such a low bit, eight to a byte. (The idea is JPEG XL's hybrid integers.)
"""

from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
from backports import zstd
from numpy.typing import NDArray

from common.delta.tensors.block import ELEMENTS_MAX
from common.delta.tensors.framing import Payload, part
from common.errors import IntegrityFailure

try:
    import pcodec  # type: ignore[import-untyped]
    from pcodec import wrapped
except ImportError:  # no wheel for this platform: such a device announces only the codec that needs none
    pcodec = None

Integers = NDArray[Any]

CONSTANT, PLAIN, PCODEC, TOKENS, NOISE = range(5)

PCO_LEVEL: Final = 8
PCO_LEVEL_NARROW: Final = 12
"""For values of few bits; for wide ones it takes six times as long for 0.2 %."""
NARROW_RANGE_BITS: Final = 11
"""Values of a range up to this many bits, of which there are so few that a high level is cheap, count as narrow."""
KEPT_BITS: Final = 4
"""Bits of the spread of values that are never taken for noise."""
NOISE_VALUES_MIN: Final = 128
LOOK_VALUES: Final = 16 * 1024
"""About so many values are looked at to choose how all are written."""
NOISE_LOSS_MAX: Final = 0.002
"""Bits per value that may be lost by taking low bits for noise."""
PCO_HEADER: Final = b"\x04\x01"
"""The header of pcodec's wrapped format: version 4.1."""
ZSTD_LEVEL: Final = 19
WINDOW_LOG: Final = 20
"""Log2 of the memory a decompressor may take for its window, in bytes."""


class Coder(Protocol):
    """An entropy coder for integers."""

    @property
    def name(self) -> str: ...

    def pack(self, values: Integers) -> bytes:
        """Between 0 and `ELEMENTS_MAX` integers of any width as bytes."""

    def unpack(self, data: bytes, count: int, dtype: np.dtype[Any]) -> Integers:
        """Exactly `count` integers modulo 2^n of `dtype`'s width; anything else is an IntegrityFailure."""


class _Pco:
    name = "pco"

    def __init__(self) -> None:
        self._writer = wrapped.FileCompressor()
        self._reader, _ = wrapped.FileDecompressor.new(PCO_HEADER)

    def pack(self, values: Integers) -> bytes:
        values = np.ascontiguousarray(values).view(f"<i{values.itemsize}")
        shift = _noise_bits(values)
        if not shift:
            return _pack(values, PCODEC, self._chunk)
        head = bytes([NOISE << 2 | values.itemsize.bit_length() - 1, shift])
        return head + part(_pack(values >> shift, PCODEC, self._chunk)) + _pack_low_bits(values, shift)

    def unpack(self, data: bytes, count: int, dtype: np.dtype[Any]) -> Integers:
        if not data or data[0] >> 2 != NOISE:
            return _unpack(data, count, dtype, PCODEC, self._values)
        width = 1 << (data[0] & 3)
        reader = Payload(data, 1)
        shift = reader.byte()
        if width > dtype.itemsize or shift % 4 or not 0 < shift < 8 * width:
            raise IntegrityFailure("a stream of integers in a payload has an impossible shift")
        values = _unpack(reader.part(), count, np.dtype(f"<i{width}"), PCODEC, self._values) << shift
        _unpack_low_bits(values, shift, reader)
        reader.end()
        out: Integers = values.astype(f"<i{dtype.itemsize}", copy=False).view(dtype)
        return out

    def _chunk(self, values: Integers) -> bytes:
        some = values[:: 1 + len(values) // LOOK_VALUES]
        narrow = (int(some.max()) - int(some.min())).bit_length() <= NARROW_RANGE_BITS
        config = pcodec.ChunkConfig(
            compression_level=PCO_LEVEL_NARROW if narrow else PCO_LEVEL,
            delta_spec=pcodec.DeltaSpec.no_op(),
            mode_spec=pcodec.ModeSpec.classic(),
            enable_8_bit=True,
        )
        chunk = self._writer.chunk_compressor(values, config)
        return bytes(chunk.write_meta()[1:] + chunk.write_page(0))

    def _values(self, data: bytes, count: int, dtype: np.dtype[Any]) -> Integers:
        out = np.empty(count, dtype)
        try:
            # The byte that was left out says classic mode, no delta encoding: nothing else can be asked of pcodec,
            # above all no window or dictionary whose size the stream would choose.
            chunk, begin = self._reader.chunk_decompressor(b"\0" + data, f"i{8 * dtype.itemsize}")
            page = data[begin - 1 :]
            progress, length = chunk.read_page_into(page, count, out)
        except BaseException as error:
            # pcodec's panics are no Exception. Everything that is not one is let through.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise IntegrityFailure("a pcodec stream in a payload is damaged") from error
            raise
        if progress.n_processed != count or not progress.finished or length != len(page):
            raise IntegrityFailure(f"a pcodec stream in a payload does not hold exactly {count} values")
        return out


class _Zstd:
    name = "zstd"

    def pack(self, values: Integers) -> bytes:
        return _pack(values, TOKENS, _pack_tokens)

    def unpack(self, data: bytes, count: int, dtype: np.dtype[Any]) -> Integers:
        return _unpack(data, count, dtype, TOKENS, _unpack_tokens)


PCO: Coder | None = _Pco() if pcodec is not None else None
ZSTD: Coder = _Zstd()


def deflate(data: bytes) -> bytes:
    """A zstd frame, without the four bytes of magic, of content whose length its reader knows."""
    options: dict[Any, int] = {
        zstd.CompressionParameter.compression_level: ZSTD_LEVEL,
        zstd.CompressionParameter.content_size_flag: 0,
        zstd.CompressionParameter.checksum_flag: 0,
    }
    return zstd.compress(data, options=options)[4:]


def inflate(frame: bytes, size: int) -> bytes:
    """Exactly `size` bytes from a frame of `deflate`: IntegrityFailure."""
    options: dict[Any, int] = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
    decompressor = zstd.ZstdDecompressor(options=options)
    try:
        data = decompressor.decompress(ZSTD_MAGIC + frame, max_length=size + 1)
    except zstd.ZstdError as error:
        raise IntegrityFailure("a zstd frame in a payload is damaged") from error
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise IntegrityFailure(f"a zstd frame in a payload does not hold exactly {size} bytes")
    return data


ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


def _pack(values: Integers, form: int, code: Callable[[Integers], bytes]) -> bytes:
    values = np.ascontiguousarray(values).view(f"<i{values.itemsize}")
    if not len(values):
        return b""
    low, high = int(values.min()), int(values.max())
    width = _width(low, high)
    narrow = values.astype(f"<i{width}", copy=False)
    if low == high:
        return bytes([CONSTANT << 2 | width.bit_length() - 1]) + narrow[:1].tobytes()
    coded = code(narrow)
    if len(coded) >= narrow.nbytes:
        form, coded = PLAIN, narrow.tobytes()
    return bytes([form << 2 | width.bit_length() - 1]) + coded


def _unpack(
    data: bytes, count: int, dtype: np.dtype[Any], form: int, decode: Callable[[bytes, int, np.dtype[Any]], Integers]
) -> Integers:
    if not 0 <= count <= ELEMENTS_MAX:
        raise IntegrityFailure(f"{count} values in one stream exceed the limits of the format")
    if not count:
        if data:
            raise IntegrityFailure("a stream of no integers in a payload is not empty")
        return np.empty(0, dtype)
    if not data or data[0] & 3 > dtype.itemsize.bit_length() - 1 or data[0] >> 2 not in (CONSTANT, PLAIN, form):
        raise IntegrityFailure("a stream of integers in a payload has an unknown form")
    found, width = data[0] >> 2, 1 << (data[0] & 3)
    narrow = np.dtype(f"<i{width}")
    if found == form:
        values = decode(data[1:], count, narrow)
    else:
        expected = width if found == CONSTANT else width * count
        if len(data) - 1 != expected:
            raise IntegrityFailure(f"a stream of integers in a payload does not hold exactly {count} values")
        values = np.frombuffer(data, narrow, offset=1)
        if found == CONSTANT:
            values = np.full(count, values[0])
    out: Integers = values.astype(f"<i{dtype.itemsize}", copy=False).view(dtype)
    return out


def _width(low: int, high: int) -> int:
    bits = max(high, ~low).bit_length() + 1
    return 1 if bits <= 8 else 2 if bits <= 16 else 4 if bits <= 32 else 8


def _spread_bits(values: Integers) -> int:
    """The length of the shortest distance within which a quarter of `values` lie (they may have several peaks)."""
    values = np.sort(values).astype(np.float64)
    quarter = len(values) // 4
    return int((values[quarter:] - values[: len(values) - quarter]).min()).bit_length()


def _noise_bits(values: Integers) -> int:
    """How many low bits to leave as they are; a multiple of 4."""
    if len(values) < NOISE_VALUES_MIN or values.itemsize == 1:
        return 0
    some = values[:: 1 + len(values) // LOOK_VALUES]
    shift = (_spread_bits(some) - KEPT_BITS) // 4 * 4
    while shift > 0 and not all(_uniform(some, place, min(shift, 8)) for place in {0, max(0, shift - 8)}):
        shift -= 4
    return max(shift, 0)


def _uniform(values: Integers, place: int, bits: int) -> bool:
    """Whether `bits` bits from `place` are noise: their entropy falls short of that by no more than chance does."""
    counts = np.bincount((values >> place) & ((1 << bits) - 1), minlength=1 << bits)
    counts = counts[counts > 0]
    entropy = len(values) * np.log2(len(values)) - float((counts * np.log2(counts)).sum())
    # The expected shortfall of n uniform draws from k values is near (k - 1) / (2 ln 2) bits (Miller, 1955).
    chance = min((1 << bits) / (2 * np.log(2)), len(values))
    return bool(len(values) * bits - entropy <= 1.3 * chance + NOISE_LOSS_MAX * len(values))


def _pack_low_bits(values: Integers, shift: int) -> bytes:
    planes = [(values >> place).astype(np.uint8).tobytes() for place in range(0, shift - 7, 8)]
    if shift % 8:
        nibbles = (values >> (shift - 4)).astype(np.uint8) & np.uint8(15)
        nibbles = np.append(nibbles, np.zeros(len(values) % 2, np.uint8))
        planes.append((nibbles[::2] | nibbles[1::2] << np.uint8(4)).tobytes())
    return b"".join(planes)


def _unpack_low_bits(values: Integers, shift: int, reader: Payload) -> None:
    """Fill the lowest `shift` bits of `values`, which are zero."""
    count = len(values)
    for place in range(0, shift - 7, 8):
        values |= np.frombuffer(reader.take(count), np.uint8).astype(values.dtype) << place
    if shift % 8:
        packed = np.frombuffer(reader.take(-(-count // 2)), np.uint8)
        values[::2] |= (packed & 15).astype(values.dtype) << (shift - 4)
        values[1::2] |= (packed >> 4).astype(values.dtype)[: count // 2] << (shift - 4)


def _pack_tokens(values: Integers) -> bytes:
    numbers = ((values << 1) ^ (values >> (8 * values.itemsize - 1))).view(f"<u{values.itemsize}")
    tokens, low = _tokens(numbers)
    planes = []
    for plane in range(int(low.max())):
        chosen = numbers[low > plane]
        planes.append(
            np.packbits((chosen >> chosen.dtype.type(plane)).astype(np.uint8) & 1, bitorder="little").tobytes()
        )
    return part(deflate(tokens.tobytes())) + b"".join(planes)


def _tokens(numbers: Integers) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    length = np.zeros(len(numbers), np.uint8)
    rest = numbers.copy()
    for shift in (32, 16, 8, 4, 2, 1):
        if shift < 8 * numbers.itemsize:
            big = rest >= numbers.dtype.type(1 << shift)
            length += big.astype(np.uint8) * np.uint8(shift)
            rest >>= big.astype(numbers.dtype) * numbers.dtype.type(shift)
    # `length` is now the place of the highest bit.
    low = np.where(length > 2, length - np.uint8(2), np.uint8(0)).astype(np.uint8)
    top = (numbers >> low.astype(numbers.dtype)).astype(np.uint8)
    tokens = np.where(low > 0, low * np.uint8(4) + top, top).astype(np.uint8)
    return tokens, low


def _unpack_tokens(data: bytes, count: int, dtype: np.dtype[Any]) -> Integers:
    reader = Payload(data)
    tokens = np.frombuffer(inflate(reader.part(), count), np.uint8)
    unsigned = np.dtype(f"<u{dtype.itemsize}")
    low = np.where(tokens < 8, 0, (tokens >> 2) - 1).astype(np.uint8)
    planes = int(low.max())
    if planes > 8 * dtype.itemsize - 3:
        raise IntegrityFailure("a token in a payload is too large for its type")
    numbers = np.where(tokens < 8, tokens, (tokens & 3) + 4).astype(unsigned) << low.astype(unsigned)
    for plane in range(planes):
        chosen = np.flatnonzero(low > plane)
        packed = np.frombuffer(reader.take(-(-len(chosen) // 8)), np.uint8)
        bits = np.unpackbits(packed, count=len(chosen), bitorder="little").astype(unsigned)
        numbers[chosen] |= bits << unsigned.type(plane)
    reader.end()
    signs = (numbers & unsigned.type(1)) * unsigned.type((1 << 8 * unsigned.itemsize) - 1)
    out: Integers = ((numbers >> unsigned.type(1)) ^ signs).view(dtype)
    return out
