"""Which model answers a request instead of the one that was asked: a release's rules, compiled once, tried in order.
Pure.

The first rule wins whose target can answer and whose expression is true. A rule that cannot be compiled here, or whose
expression fails on a request, is skipped and told of; it never fails the request. Expressions are `common.expr`'s, over
`ROUTE_NAMES`: `load.waiting`, `load.busy`, `load.cores`, `priority`, `input["NAME"].shape` and `.datatype`, and the
`parameters` of the request. Turning facts into CEL's values costs more than evaluating, so a rule gets only those that
it speaks of.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from common.artifact.serving import ROUTE_NAMES, Route
from common.artifact.tensors import Array, datatype_of
from common.errors import FerryError
from common.ids import ModelName

if TYPE_CHECKING:
    from common.expr import Expression

HOPS_MAX: Final = 3
"""Models that a request may be handed on to, one after the other."""
PARAMETER_CHARS_MAX: Final = 256
"""Longer texts among a request's parameters are not shown to rules."""
EXTRA: Final = "install edgeferry[routes] on this device"


class Load(NamedTuple):
    """Requests that wait for a core, cores that run one, and cores that there are."""

    waiting: int
    busy: int
    cores: int


class Ask(NamedTuple):
    """What rules may know of a request."""

    load: Load
    priority: int
    feeds: Mapping[str, Array]
    parameters: Mapping[str, Any]

    def facts(self, names: frozenset[str]) -> dict[str, Any]:
        """The facts of those `names`."""
        facts: dict[str, Any] = {}
        if "load" in names:
            facts["load"] = self.load._asdict()
        if "priority" in names:
            facts["priority"] = self.priority
        if "input" in names:
            facts["input"] = {
                name: {"shape": list(array.shape), "datatype": datatype_of(array)} for name, array in self.feeds.items()
            }
        if "parameters" in names:
            facts["parameters"] = {name: value for name, value in self.parameters.items() if _plain(value)}
        return facts


class Rule(NamedTuple):
    """A route, compiled; or why it could not be."""

    route: Route
    expression: "Expression | None" = None
    flaw: str = ""


class Decision(NamedTuple):
    """The index of the rule that won, if one did, and the rules before it that failed, with the reason."""

    rule: int | None = None
    failed: tuple[tuple[int, str], ...] = ()


def compiled(routes: Iterable[Route]) -> tuple[Rule, ...]:
    """The rules of a release, ready to be tried."""
    return tuple(_compiled(route) for route in routes)


def decide(rules: Iterable[Rule], ask: Ask, obstacle: Callable[[ModelName], str]) -> Decision:
    """Which rule wins. `obstacle` says why a model cannot answer this request; empty if it can."""
    failed: list[tuple[int, str]] = []
    for index, rule in enumerate(rules):
        if rule.expression is None or obstacle(rule.route.model):
            continue
        try:
            if rule.expression.matches(ask.facts(rule.expression.names)):
                return Decision(index, tuple(failed))
        except FerryError as error:
            failed.append((index, str(error)))
    return Decision(None, tuple(failed))


def _compiled(route: Route) -> Rule:
    try:
        from common.expr import compile_expression  # takes a package that devices without routes do without
    except ImportError:
        return Rule(route, flaw=EXTRA)
    try:
        return Rule(route, compile_expression(route.when, ROUTE_NAMES, "when"))
    except FerryError as error:
        return Rule(route, flaw=str(error))


def _plain(value: object) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= PARAMETER_CHARS_MAX)
