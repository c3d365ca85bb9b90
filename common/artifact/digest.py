"""SHA-256 names for bytes, in the OCI text form `sha256:<64 hex digits>`."""

import hashlib

from common.ids import Digest


class Hasher:
    """A running SHA-256 over bytes as they pass by (FIPS 180-4)."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()
        self.size = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take `data` in."""
        self._state.update(data)
        self.size += len(data)

    def digest(self) -> Digest:
        """The name of everything taken in so far."""
        return Digest(f"sha256:{self._state.hexdigest()}")


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """The name of `data`."""
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


def hex_of(digest: Digest) -> str:
    """The 64 hex digits of a digest, for file names."""
    return digest.removeprefix("sha256:")
