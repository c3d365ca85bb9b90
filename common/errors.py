"""The root of every error that Edgeferry raises on purpose.

An error says whose fault it is (by its class), what is wrong (its message, starting with the field where there is one)
and what to do next (`fix`). Shells turn classes into HTTP statuses and exit codes; nothing here knows about either.
Foreign exceptions are wrapped at the adapter that met them, with `raise ... from`.
"""

from typing import ClassVar


class FerryError(Exception):
    """An expected failure.

    `code` is stable and for programs, `message` and `fix` are sentences for people, `field` is the path of the input
    that is wrong, for example `phases[1].percent`.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, field: str | None = None, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.fix = fix

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        fix = f" ({self.fix})" if self.fix else ""
        return f"{where}{self.message}{fix}"


class InvalidInput(FerryError):
    """The caller sent something that can never work as it stands."""

    code = "invalid_input"


class TooLarge(InvalidInput):
    """The input exceeds a named limit."""

    code = "too_large"


class Unauthenticated(FerryError):
    """Nobody, or nobody we know: the credential is missing, wrong, used up or expired."""

    code = "unauthenticated"


class Forbidden(FerryError):
    """Somebody we know who may not do this."""

    code = "forbidden"


class NotFound(FerryError):
    """The thing named does not exist."""

    code = "not_found"


class Conflict(FerryError):
    """The request is valid, but not in the present state of things."""

    code = "conflict"


class PreconditionFailed(FerryError):
    """The caller's idea of the resource (If-Match) is out of date."""

    code = "precondition_failed"


class IntegrityFailure(FerryError):
    """Bytes are not what they claim to be: digest, length, format or signature."""

    code = "integrity_failure"


class StorageFull(FerryError):
    """This machine has no room left for the bytes; what was there is kept."""

    code = "storage_full"


class StorageFailed(FerryError):
    """This machine's disk refuses to take anything: it is read-only or it fails. What is in memory goes on."""

    code = "storage_failed"


class Unavailable(FerryError):
    """Transient: a peer or the network did not answer. Try again later; it is not a verdict on anything."""

    code = "unavailable"


class DeadlineExceeded(Unavailable):
    """The caller's time was up before the work could be begun, or would be before it ends; it was not begun."""

    code = "deadline_exceeded"
