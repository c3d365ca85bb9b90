"""The join string: everything a new device needs to find its fleet and be let in, as one word to copy.

`ferry1.` and the URL-safe base64 of a small JSON object. It holds a claim token, so it is a secret until it is used up.
"""

import base64
import binascii
from urllib.parse import urlsplit

import msgspec

from common.errors import InvalidInput

PREFIX = "ferry1."
CHARS_MAX = 2048


class JoinString(msgspec.Struct, frozen=True):
    """Where the controller is and the claim token that lets a device in."""

    url: str
    token: str

    def __str__(self) -> str:
        return PREFIX + base64.urlsafe_b64encode(msgspec.json.encode(self)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> "JoinString":
        """The join string in `text`, or `InvalidInput`."""
        fix = "copy the whole line that `ferry device token create` printed"
        if not text.startswith(PREFIX) or len(text) > CHARS_MAX:
            raise InvalidInput("does not look like a join string", field="join string", fix=fix)
        body = text.removeprefix(PREFIX)
        try:
            raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            join = msgspec.json.decode(raw, type=cls)
            scheme = urlsplit(join.url).scheme
        except (binascii.Error, msgspec.DecodeError, ValueError, RecursionError) as error:
            raise InvalidInput("is damaged", field="join string", fix=fix) from error
        if scheme not in {"http", "https"}:
            raise InvalidInput(f"controller URL {join.url[:80]!r} is not http or https", field="join string", fix=fix)
        return join
