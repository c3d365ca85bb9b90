"""The protobuf wire format, walked over a `ByteSource` without reading what is not asked for.

Just enough to find fields in a message of hundreds of megabytes: a field is a number, a wire type and a place, and
payloads are only fetched by whoever wants them. Everything comes from strangers, so every length is checked against
the message it lies in, and the number of fields looked at is bounded.

Source: Protocol Buffers documentation, "Encoding" (https://protobuf.dev/programming-guides/encoding/). Groups (wire
types 3 and 4) are refused; ONNX has none.
"""

from collections.abc import Iterator
from typing import NamedTuple

from common.artifact.source import ByteSource

WINDOW_BYTES = 64 * 1024
"""How much is read at once; headers of neighbouring fields mostly share a window."""
FIELDS_MAX = 4_000_000
"""Fields looked at in one file, a few seconds of work; real models have thousands to some hundred thousand."""
VARINT_BYTES_MAX = 10

VARINT, I64, LEN, I32 = 0, 1, 2, 5


class Malformed(ValueError):
    """The bytes are not a well-formed message; the text says where and why."""


class Span(NamedTuple):
    """A part of the source: from `start` up to, not including, `end`."""

    start: int
    end: int


class Field(NamedTuple):
    """One field of a message: `value` holds a number (varint fields), `span` the payload (length-delimited ones)."""

    number: int
    wire_type: int
    value: int
    span: Span


class WireReader:
    """Walks messages of one source. `Malformed` where the bytes break the format."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._window = b""
        self._window_start = 0
        self._fields_left = FIELDS_MAX

    @property
    def whole(self) -> Span:
        """The outermost message: the whole source."""
        return Span(0, self._source.size)

    def fields(self, message: Span) -> Iterator[Field]:
        """The fields of the message in `message`, in file order."""
        position = message.start
        while position < message.end:
            field, position = self._field(position, message.end)
            yield field

    def text(self, span: Span, chars_max: int) -> str:
        """The UTF-8 string in `span`."""
        length = span.end - span.start
        if length > chars_max:
            raise Malformed(f"a string of {length} bytes at byte {span.start}, the limit is {chars_max}")
        try:
            return self._read(span.start, length).decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"a string that is not UTF-8 at byte {span.start}") from error

    def varints(self, span: Span, count_max: int) -> list[int]:
        """The packed numbers in `span`."""
        numbers: list[int] = []
        position = span.start
        while position < span.end:
            if len(numbers) == count_max:
                raise Malformed(f"more than {count_max} numbers at byte {span.start}")
            value, position = self._varint(position, span.end)
            numbers.append(value)
        return numbers

    def _field(self, start: int, end: int) -> tuple[Field, int]:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise Malformed(f"more than {FIELDS_MAX} fields")
        tag, position = self._varint(start, end)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise Malformed(f"field number 0 at byte {start}")
        value = 0
        payload = position
        if wire_type == VARINT:
            value, position = self._varint(position, end)
        elif wire_type == LEN:
            length, payload = self._varint(position, end)
            position = payload + length
        elif wire_type in {I64, I32}:
            position += 8 if wire_type == I64 else 4
        else:
            raise Malformed(f"wire type {wire_type} at byte {start}")
        if position > end:
            raise Malformed(f"the field at byte {start} should reach to byte {position}, but ends at byte {end}")
        return Field(number, wire_type, value, Span(payload, position)), position

    def _varint(self, start: int, end: int) -> tuple[int, int]:
        raw = self._read(start, min(VARINT_BYTES_MAX, end - start))
        value = 0
        for index, byte in enumerate(raw):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, start + index + 1
        raise Malformed(f"a number without an end at byte {start}")

    def _read(self, offset: int, length: int) -> bytes:
        index = offset - self._window_start
        if index < 0 or index + length > len(self._window):
            self._window = self._source.read_at(offset, max(length, WINDOW_BYTES))
            self._window_start = offset
            index = 0
        data = self._window[index : index + length]
        if len(data) < length:
            raise Malformed(f"the file ends at byte {offset + len(data)}")
        return data


def signed(value: int) -> int:
    """A varint's 64 bits as an int64 (ONNX writes -1 that way)."""
    return value - (1 << 64) if value >> 63 else value
