"""A release's terms of serving as they are published: what no device could keep is refused before anybody signs for it.

Terms that only some device cannot keep (a rule's target that it does not serve) are the device's to pass over.
"""

from collections.abc import Mapping

from msgspec.structs import replace

from common.artifact import Variant
from common.artifact.padding import check_padding
from common.artifact.serving import ROUTE_NAMES, GivenServing, Route, ServingTerms
from common.errors import InvalidInput
from common.expr import compile_expression
from common.ids import ModelName, parse_model_name

Serving = Mapping[str, GivenServing]
"""By variant, as given."""
Terms = Mapping[str, ServingTerms]
"""By variant, as signed."""


def asked_terms(given: Serving) -> dict[str, ServingTerms]:
    """The terms that say something; without any a release is what it was without being asked."""
    return {name: terms for name, one in given.items() if (terms := one.terms()) != ServingTerms()}


def with_terms(variants: Mapping[str, Variant], terms: Terms, model: ModelName) -> dict[str, Variant]:
    """The variants of `model` with their terms; `InvalidInput`, below `serving.NAME`, when they do not fit."""
    return {
        name: replace(variant, serving=_checked(terms[name], variant, model, f"serving.{name}"))
        if name in terms
        else variant
        for name, variant in variants.items()
    }


def _checked(terms: ServingTerms, variant: Variant, model: ModelName, field: str) -> ServingTerms:
    check_padding(terms.padding, variant.inputs, f"{field}.padding")
    for index, route in enumerate(terms.routes):
        _check_route(route, model, f"{field}.routes[{index}]")
    return terms


def _check_route(route: Route, model: ModelName, field: str) -> None:
    parse_model_name(route.model, f"{field}.model")
    if route.model == model:
        raise InvalidInput(f"leads back to {model}", field=f"{field}.model", fix="name another model")
    compile_expression(route.when, ROUTE_NAMES, f"{field}.when")
