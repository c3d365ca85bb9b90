"""How a release is served, as part of the release: what may be answered from memory, by which other model, and padded.

These terms are in the manifest of a variant, so they are signed, rolled out and rolled back with the bytes that they
are about. A device's owner may change single ones (`ServingChanges`). Nothing here is needed to serve a release: a
device that cannot keep a term, or does not know it, answers without it. What the terms mean is in
docs/reference/serving-file.md; here is their form. Whether a padding fits a model is in `common.artifact.padding`.

Expressions are only bounded here; whoever signs or uses them compiles them over `ROUTE_NAMES`.
"""

from typing import Annotated, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from common.ids import MODEL_NAME, ModelName

CACHE_BYTES_MAX: Final = 1024**3
"""Answers that one release may ask a device to keep, in bytes."""
ROUTES_MAX: Final = 16
ROUTE_CHARS_MAX: Final = 1024
"""Of a rule's expression."""
PADDED_INPUTS_MAX: Final = 16
AXES_MAX: Final = 32
ROUTE_NAMES: Final = frozenset({"load", "priority", "input", "parameters"})
"""What a rule may speak of."""


class Route(msgspec.Struct, frozen=True):
    """Requests of which the expression `when` is true are answered by `model` instead."""

    when: Annotated[str, Meta(min_length=1, max_length=ROUTE_CHARS_MAX)]
    model: Annotated[ModelName, Meta(pattern=f"^{MODEL_NAME.pattern}$(?!\n)")]


class Padding(msgspec.Struct, frozen=True, omit_defaults=True):
    """An input may be made longer along `axis` with `value`, and the input `mask` with zeros, without its request's
    answer changing but for that length.
    """

    axis: Annotated[int, Meta(ge=1, lt=AXES_MAX)]
    value: bool | int | float | str = 0
    mask: str | None = None


CacheBytes = Annotated[int, Meta(ge=0, le=CACHE_BYTES_MAX)]


class ServingTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """`cache_bytes` of answers to equal requests are kept (0: none); `routes` are tried in their order; `padding` is by
    input.
    """

    cache_bytes: CacheBytes = 0
    routes: Annotated[tuple[Route, ...], Meta(max_length=ROUTES_MAX)] = ()
    padding: Annotated[dict[str, Padding], Meta(max_length=PADDED_INPUTS_MAX)] = {}


class GivenRoute(Route, frozen=True, forbid_unknown_fields=True):
    """A route as a person writes it, in whom a word that means nothing is a mistake."""


class GivenPadding(Padding, frozen=True, forbid_unknown_fields=True):
    """The same for a padding."""


GivenRoutes = Annotated[tuple[GivenRoute, ...], Meta(max_length=ROUTES_MAX)]
GivenPaddings = Annotated[dict[str, GivenPadding], Meta(max_length=PADDED_INPUTS_MAX)]


class GivenServing(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Terms as a publisher gives them; see `ServingTerms`."""

    cache_bytes: CacheBytes = 0
    routes: GivenRoutes = ()
    padding: GivenPaddings = {}

    def terms(self) -> ServingTerms:
        """What the release says."""
        return msgspec.convert(msgspec.to_builtins(self), ServingTerms)


class ServingChanges(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a device's owner says instead; what is not set stays as the release has it."""

    cache_bytes: CacheBytes | UnsetType = UNSET
    routes: GivenRoutes | UnsetType = UNSET
    padding: GivenPaddings | UnsetType = UNSET

    def applied(self, terms: ServingTerms) -> ServingTerms:
        """`terms` with these changes."""
        said = {name: value for name in terms.__struct_fields__ if (value := getattr(self, name)) is not UNSET}
        return replace(terms, **said)
