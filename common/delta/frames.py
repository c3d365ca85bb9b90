"""zstd frames as patches hold them: without the magic number, content size and checksum that others already state.

A frame may be made with a prefix: bytes that both sides have and that it refers back to (the raw dictionary of RFC
8878, section 5, as `zstd --patch-from` uses it). Reading bounds everything before it is allocated: the window, the
content, and that nothing follows it.
"""

from collections.abc import Iterator
from typing import Any

from backports import zstd

from common.errors import IntegrityFailure

MAGIC = b"\x28\xb5\x2f\xfd"
WINDOW_LOG_MAX = 23
"""Log2 of the memory, in bytes, that a device may need for the window of a frame: zstd's own level 19 uses as much."""
WINDOW_LOG_MIN = 10
PIECE_BYTES = 256 * 1024
"""Content comes out in pieces of at most this."""
LEVEL = 19
LEVEL_MAX = 22


def compress(data: bytes, *, prefix: bytes = b"", level: int = LEVEL) -> bytes:
    """`data` as a frame, to be read with the same `prefix`."""
    window_log = min(max(WINDOW_LOG_MIN, (len(data) + len(prefix)).bit_length()), WINDOW_LOG_MAX)
    options: dict[Any, int] = {
        zstd.CompressionParameter.compression_level: level,
        zstd.CompressionParameter.window_log: window_log,
        zstd.CompressionParameter.content_size_flag: 0,
        zstd.CompressionParameter.checksum_flag: 0,
        zstd.CompressionParameter.dict_id_flag: 0,
    }
    dictionary = zstd.ZstdDict(prefix, is_raw=True).as_prefix if len(prefix) >= 8 else None
    return zstd.compress(data, options=options, zstd_dict=dictionary)[len(MAGIC) :]


def decompress(frame: bytes, size: int, *, prefix: bytes = b"") -> bytes:
    """The `size` bytes in `frame`; `IntegrityFailure` when it does not hold exactly these."""
    return b"".join(stream(iter((frame,)), size, prefix=prefix))


def stream(frame: Iterator[bytes], size: int, *, prefix: bytes = b"") -> Iterator[bytes]:
    """The `size` bytes in a frame that comes in pieces itself, in pieces of at most `PIECE_BYTES`."""
    options: dict[Any, int] = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG_MAX}
    dictionary = zstd.ZstdDict(prefix, is_raw=True).as_prefix if len(prefix) >= 8 else None
    decompressor = zstd.ZstdDecompressor(zstd_dict=dictionary, options=options)
    del prefix  # the dictionary has a copy
    left, given = size, MAGIC + next(frame, b"")
    while True:
        try:
            piece = decompressor.decompress(given, max_length=min(PIECE_BYTES, left + 1))
        except (zstd.ZstdError, ValueError, EOFError) as error:
            raise IntegrityFailure("a compressed part of the patch is damaged") from error
        left -= len(piece)
        if left < 0:
            raise _wrong_size(size)
        if piece:
            yield piece
        if decompressor.eof:
            break
        given = next(frame, b"") if decompressor.needs_input else b""
        if decompressor.needs_input and not given:
            raise _wrong_size(size)
    if left or decompressor.unused_data or next(frame, b""):
        raise _wrong_size(size)


def _wrong_size(size: int) -> IntegrityFailure:
    return IntegrityFailure(f"a compressed part of the patch does not hold the {size} bytes it promises")
