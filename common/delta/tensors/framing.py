"""Reading the numbers and parts that payloads are made of; a part is a varint length and that many bytes.

Every read is checked against what is left of the payload: `IntegrityFailure`, before anything is allocated.
"""

from common.delta.varint import Cursor, varint
from common.errors import IntegrityFailure


def part(data: bytes) -> bytes:
    """`data` behind its length."""
    return varint(len(data)) + data


class Payload(Cursor):
    """A payload that is read from front to back."""

    def number(self, maximum: int) -> int:
        """The next number, which must not exceed `maximum`."""
        value = self.varint()
        if value > maximum:
            raise IntegrityFailure(f"the number {value} in a payload exceeds {maximum}")
        return value

    def part(self) -> bytes:
        """The next part."""
        return self.take(self.varint())

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data) - self.place)

    def end(self) -> None:
        """Refuse bytes that nobody has asked for."""
        if not self.ended():
            raise IntegrityFailure(f"{len(self._data) - self.place} bytes follow a payload")
