"""Repeated requests: the answer to a mutation is kept under its Idempotency-Key and given again.

(IETF draft-ietf-httpapi-idempotency-key-header.) The key belongs to the caller's token; the same key with another
request is refused (422). The answer is stored in the same unit of work as its effects, so there is never one without
the other. Refusals are not stored: they changed nothing, and the repeat may find things different.

Answers can hold credentials (a join string, a device's token). They are therefore sealed with a key that is derived
from the caller's own token, which the store does not know: whoever reads the database reads no secret.
"""

import hashlib
import os

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from common.errors import Conflict, InvalidInput
from controller.api.problems import KeyReused
from controller.store.port import StoredResponse, Transaction

HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotent-Replayed"
KEY_CHARS_MAX = 128
NONCE_BYTES = 12


class Replayed(Exception):
    """Not an error: this request was answered before; here is the answer."""

    def __init__(self, status: int, body: bytes, etag: str) -> None:
        super().__init__(status)
        self.status = status
        self.body = body
        self.etag = etag


class Repeat(msgspec.Struct, frozen=True):
    """One request's claim to be the same as an earlier one. `actor` is the token's id, `secret` its text."""

    actor: str
    key: str
    request_sha256: str
    secret: str

    def __repr__(self) -> str:
        return f"Repeat(actor={self.actor!r}, key={self.key!r})"

    def recall(self, tx: Transaction) -> None:
        """Raise `Replayed` if this request was answered before, `KeyReused` if the key belongs to another one."""
        stored = tx.journal.response(self.actor, self.key)
        if stored is None:
            return
        if stored.request_sha256 != self.request_sha256:
            fix = "use a new key for each new request"
            raise KeyReused("the key was used for a different request", field=HEADER, fix=fix)
        raise Replayed(stored.status, self._open(stored.body), stored.etag)

    def remember(self, tx: Transaction, status: int, body: bytes, etag: str, now: float) -> None:
        """Keep the answer for the repeats to come."""
        stored = StoredResponse(
            actor=self.actor,
            key=self.key,
            request_sha256=self.request_sha256,
            status=status,
            body=self._seal(body),
            etag=etag,
            at=now,
        )
        tx.journal.put_response(stored)

    def _seal(self, body: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher().encrypt(nonce, body, self.key.encode())

    def _open(self, sealed: bytes) -> bytes:
        try:
            return self._cipher().decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], self.key.encode())
        except InvalidTag as error:
            raise Conflict("the stored answer cannot be read any more", fix="use a new Idempotency-Key") from error

    def _cipher(self) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(hashlib.sha256(b"edgeferry stored answer\0" + self.secret.encode()).digest())


def check_key(text: str) -> str:
    """The header's value, or `InvalidInput`."""
    if not text.isascii() or not text.isprintable() or not 1 <= len(text) <= KEY_CHARS_MAX:
        raise InvalidInput("not a usable key", field=HEADER, fix=f"1 to {KEY_CHARS_MAX} printable ASCII characters")
    return text


def request_digest(method: str, path_qs: str, body: bytes) -> str:
    """What makes two requests the same."""
    return hashlib.sha256(f"{method} {path_qs}\n".encode() + body).hexdigest()
