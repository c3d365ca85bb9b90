"""Numbers in as few bytes as they need: seven bits a byte, the lowest first, the eighth bit set on all but the last.

(The "varint" and "zigzag" of Protocol Buffers, https://protobuf.dev/programming-guides/encoding/.) Numbers are below
2^63, so that whoever adds two of them need not think about it.
"""

from common.errors import IntegrityFailure

VARINT_BYTES_MAX = 9


def varint(value: int) -> bytes:
    """`value`, 0 to 2^63 - 1, in 1 to 9 bytes."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def zigzag(value: int) -> int:
    """A number of either sign as one without: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return value * 2 if value >= 0 else -value * 2 - 1


def unzigzag(value: int) -> int:
    """The inverse of `zigzag`."""
    return -(value + 1) // 2 if value & 1 else value // 2


class Cursor:
    """Reads numbers one after another from bytes that a stranger wrote; `IntegrityFailure` where they end too soon."""

    def __init__(self, data: bytes, place: int = 0) -> None:
        self._data = data
        self.place = place

    def ended(self) -> bool:
        """Whether all was read."""
        return self.place >= len(self._data)

    def byte(self) -> int:
        """The next byte."""
        if self.ended():
            raise IntegrityFailure("the patch is cut off in the middle of a number", fix="fetch it again")
        value = self._data[self.place]
        self.place += 1
        return value

    def varint(self) -> int:
        """The next number."""
        value = 0
        for shift in range(0, 7 * VARINT_BYTES_MAX, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise IntegrityFailure(f"the patch has a number of more than {VARINT_BYTES_MAX} bytes")

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        data = self._data[self.place : self.place + length]
        if len(data) < length:
            raise IntegrityFailure("the patch is cut off", fix="fetch it again")
        self.place += length
        return data
