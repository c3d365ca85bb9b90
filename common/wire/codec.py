"""Bytes to typed messages and back: parsed once, at the edge.

`decode` checks the size first, then the form, then the protocol version; whatever is wrong becomes one `InvalidInput`
that names the path. `Chunk` is MessagePack (it carries bytes, which JSON would blow up by a third); everything else
is JSON.
"""

from typing import TypeVar

import msgspec

from common.errors import InvalidInput, TooLarge
from common.wire.messages import (
    CHUNK_BYTES_MAX,
    PROTOCOL_VERSION,
    Chunk,
    ChunkRequest,
    DesiredState,
    Heartbeat,
    Message,
    Presence,
    ReportedState,
    Telemetry,
)

M = TypeVar("M", bound=Message)

BYTES_MAX: dict[type[Message], int] = {
    Presence: 8 * 1024,
    Heartbeat: 8 * 1024,
    Telemetry: 64 * 1024,
    ReportedState: 64 * 1024,
    ChunkRequest: 1024,
    Chunk: CHUNK_BYTES_MAX + 1024,
    DesiredState: 128 * 1024,
}
"""The largest encoded message of each type, in bytes."""


def encode(message: Message) -> bytes:
    """The wire form of `message`; `TooLarge` if it exceeds its type's limit."""
    data = msgspec.msgpack.encode(message) if isinstance(message, Chunk) else msgspec.json.encode(message)
    _check_size(type(message), len(data))
    return data


def decode(data: bytes, message_type: type[M]) -> M:
    """The message in `data`, or `InvalidInput` (`TooLarge` where it exceeds its type's limit)."""
    _check_size(message_type, len(data))
    try:
        if message_type is Chunk:
            message: M = msgspec.msgpack.decode(data, type=message_type)
        else:
            message = msgspec.json.decode(data, type=message_type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"not a {message_type.__name__}: {error}", field=message_type.__name__) from error
    if message.v != PROTOCOL_VERSION:
        fix = f"this program speaks version {PROTOCOL_VERSION}; upgrade the older side"
        raise InvalidInput(f"protocol version {message.v}", field="v", fix=fix)
    return message


def _check_size(message_type: type[Message], size: int) -> None:
    limit = BYTES_MAX[message_type]
    if size > limit:
        raise TooLarge(f"{size} bytes", field=message_type.__name__, fix=f"at most {limit} bytes")
