"""Who is calling: bearer tokens (RFC 6750) and what each role may do.

A token is 32 random bytes behind a prefix that secret scanners can find; the store knows only its SHA-256, which is
enough because nobody can guess 256 bits. Token texts never reach a log, an event, an audit entry or an error.
"""

import hashlib
import secrets

import msgspec
from aiohttp import web

from common.errors import Unauthenticated
from controller.store.port import Role, Store, Token

TOKEN_BYTES = 32
TOKEN_CHARS_MAX = 256
PREFIX_OF: dict[Role, str] = {"admin": "ferrya_", "device": "ferryd_", "join": "ferryj_"}


class Actor(msgspec.Struct, frozen=True):
    """The owner of a valid token. `subject` is the device id for role `device`, else a name for the audit log."""

    token: Token

    @property
    def role(self) -> Role:
        return self.token.role

    @property
    def name(self) -> str:
        return f"{self.token.role}:{self.token.subject}"


def new_token(
    role: Role,
    subject: str,
    now: float,
    *,
    ttl_s: float | None = None,
    uses: int | None = None,
    labels: dict[str, str] | None = None,
) -> tuple[str, Token]:
    """A fresh credential: the text to hand out once, and the row to keep."""
    text = PREFIX_OF[role] + secrets.token_urlsafe(TOKEN_BYTES)
    token = Token(
        id=secrets.token_hex(8),
        role=role,
        sha256=fingerprint(text),
        subject=subject,
        created_at=now,
        expires_at=None if ttl_s is None else now + ttl_s,
        uses_left=uses,
        labels=labels or {},
    )
    return text, token


def fingerprint(text: str) -> str:
    """What the store keeps of a token."""
    return hashlib.sha256(text.encode()).hexdigest()


def bearer_of(request: web.BaseRequest) -> str:
    """The token text in the Authorization header, or `Unauthenticated`."""
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    text = text.strip()
    if scheme.lower() != "bearer" or not text or len(text) > TOKEN_CHARS_MAX:
        raise Unauthenticated("no bearer token", field="Authorization", fix="send 'Authorization: Bearer TOKEN'")
    return text


async def authenticate(store: Store, text: str, now: float) -> Actor:
    """Whose token `text` is; `Unauthenticated` when it is unknown or expired.

    Whether uses are left is for the unit of work that consumes one: a repeated request must still be answered after
    its first run took the last use.
    """
    sha256 = fingerprint(text)
    token = await store.read(lambda tx: tx.tokens.find(sha256))
    if token is None:
        raise Unauthenticated("the token is unknown", field="Authorization", fix="use a token of this controller")
    if token.expires_at is not None and token.expires_at <= now:
        raise Unauthenticated("the token has expired", field="Authorization", fix="ask for a new one")
    return Actor(token)
