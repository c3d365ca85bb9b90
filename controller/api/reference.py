"""The list of routes for docs/reference/api.md, made from the routes themselves. A test keeps the page up to date."""

from typing import Any, get_args

import msgspec

from controller.api import application
from controller.api.openapi import alternatives
from controller.api.problems import STATUS_OF
from controller.api.route import JSON, ROUTES, Route


def listing() -> str:
    """Routes and problem codes as Markdown."""
    return f"{_routes()}\n\n{_problems()}"


def _routes() -> str:
    head = "| Route | Who | In | Out |\n| --- | --- | --- | --- |"
    modules = [module.__name__ for module in application.DECLARED_IN]
    routes = sorted(ROUTES, key=lambda route: modules.index(route.handler.__module__))
    return "\n".join([head, *map(_row, routes)])


def _row(route: Route) -> str:
    who = ", ".join(route.roles) or "anybody"
    query = f"?{', '.join(field.encode_name for field in msgspec.structs.fields(route.query))}" if route.query else ""
    taken = " ".join(filter(None, (_type_of(route.body, route.consumes), f"`{query}`" if query else ""))) or "-"
    statuses = "/".join(str(status) for status in route.statuses)
    given = f"{statuses} {_type_of(route.answer, route.produces)}".strip()
    return f"| `{route.method} {route.path}`<br>{route.summary} | {who} | {taken} | {given} |"


def _type_of(declared: object, media_type: str) -> str:
    names = [_name(one) for one in alternatives(declared)]
    if names:
        return " or ".join(f"`{name}`" for name in names)
    return "" if media_type == JSON else media_type


def _name(declared: Any) -> str:
    parts = ", ".join(part.__name__ for part in get_args(declared))
    return f"{declared.__name__}[{parts}]" if parts else str(declared.__name__)


def _problems() -> str:
    head = "| Status | Code | Meaning |\n| --- | --- | --- |"
    rows = sorted(((status.value, kind) for kind, status in STATUS_OF.items()), key=lambda row: (row[0], row[1].code))
    lines = (f"| {status} | `{kind.code}` | {(kind.__doc__ or '').strip().splitlines()[0]} |" for status, kind in rows)
    return "\n".join([head, *lines])
