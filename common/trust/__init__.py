"""Signatures: who said so, and is it still the newest word.

An order or a manifest travels as a DSSE envelope (Dead Simple Signing Envelope, protocol v1.0.2): the signature covers
the payload's type and its exact bytes, so that a signed manifest can never be passed off as a signed order. Keys are
Ed25519 (RFC 8032) and are named by the digest of their public bytes. The key format, the envelope and the
cryptography are securesystemslib's; this package adds limits, named errors, and the rule against rolling back.

It reads no files and no clock: keys and bytes come in as arguments.
"""

import json
from typing import Any

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error as SecureSystemsLibError
from securesystemslib.signer._crypto_signer import CryptoSigner
from securesystemslib.signer._key import Key, SSlibKey

from common.errors import IntegrityFailure

ENVELOPE_BYTES_MAX = 512 * 1024
SIGNATURES_MAX = 16


class PublicKey(msgspec.Struct, frozen=True):
    """A key that a program trusts: its id and its PEM (SubjectPublicKeyInfo)."""

    keyid: str
    pem: str


class Signer:
    """A private Ed25519 key that can sign envelopes."""

    def __init__(self, signer: CryptoSigner) -> None:
        self._signer = signer

    @classmethod
    def generate(cls) -> "Signer":
        """A new key from the operating system's randomness."""
        return cls(CryptoSigner.generate_ed25519())

    @classmethod
    def from_pem(cls, pem: bytes) -> "Signer":
        """The key that `to_pem` gave; `IntegrityFailure` when it is not an unencrypted Ed25519 PKCS #8 key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise IntegrityFailure("not a private key in PEM form", fix="restore it from a backup") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise IntegrityFailure("the signing key is not an Ed25519 key", fix="restore it from a backup")
        return cls(CryptoSigner(key))

    def to_pem(self) -> bytes:
        """PKCS #8, unencrypted: keep it in a file that only its owner can read."""
        return self._signer.private_bytes

    @property
    def public_key(self) -> PublicKey:
        key = self._signer.public_key
        return PublicKey(key.keyid, key.keyval["public"])

    def sign(self, payload_type: str, payload: bytes) -> bytes:
        """The DSSE envelope (JSON) around `payload`. Ed25519 is deterministic: the same input gives the same bytes."""
        envelope = Envelope(payload, payload_type, {})
        envelope.sign(self._signer)
        return json.dumps(envelope.to_dict(), separators=(",", ":"), sort_keys=True).encode()


def verify(envelope_bytes: bytes, payload_type: str, keys: tuple[PublicKey, ...], threshold: int = 1) -> bytes:
    """The payload, if at least `threshold` of `keys` signed it as `payload_type`; otherwise `IntegrityFailure`.

    Nothing of the envelope is used before the signatures hold, apart from what is needed to check them.
    """
    if len(envelope_bytes) > ENVELOPE_BYTES_MAX:
        raise IntegrityFailure(f"signed envelope is {len(envelope_bytes)} bytes, the limit is {ENVELOPE_BYTES_MAX}")
    envelope = _parse(envelope_bytes)
    if envelope.payload_type != payload_type:
        raise IntegrityFailure(f"signed as {envelope.payload_type[:80]!r}, expected {payload_type!r}")
    trusted: list[Key] = [SSlibKey(key.keyid, "ed25519", "ed25519", {"public": key.pem}) for key in keys]
    try:
        envelope.verify(trusted, threshold)
    except (SecureSystemsLibError, ValueError) as error:
        raise IntegrityFailure("the signature is not by a trusted key, or the bytes were changed") from error
    return bytes(envelope.payload)


def unverified_payload(envelope_bytes: bytes) -> bytes:
    """The payload, whoever signed it: only for envelopes of our own making that never left our store."""
    return bytes(_parse(envelope_bytes).payload)


def _parse(envelope_bytes: bytes) -> Envelope:
    try:
        raw: Any = json.loads(envelope_bytes)
        if len(raw["signatures"]) > SIGNATURES_MAX:
            raise IntegrityFailure(f"more than {SIGNATURES_MAX} signatures")
        return Envelope.from_dict(raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SecureSystemsLibError) as error:
        raise IntegrityFailure(f"not a signed envelope: {type(error).__name__}") from error


def is_newer(generation: int, highest_accepted: int) -> bool:
    """Whether an order may replace what was accepted before. Generations never decrease (anti-rollback)."""
    return generation > highest_accepted
