"""The OpenAPI 3.1 document, made from the routes. The schemas are msgspec's JSON Schema 2020-12, which 3.1 takes."""

import re
from functools import cache
from importlib.metadata import version
from types import UnionType
from typing import Any, get_args

import msgspec

from common import ids
from controller.api.idempotency import HEADER, KEY_CHARS_MAX
from controller.api.problems import CONTENT_TYPE
from controller.api.route import JSON, ROUTES, Route
from controller.resources import Problem, Request, View

REF_TEMPLATE = "#/components/schemas/{name}"

KEY_SCHEMA = {"type": "string", "pattern": f"^[ -~]{{1,{KEY_CHARS_MAX}}}$"}
ANY_NAME = re.compile(r"[ -~]{1,64}")

PATTERN_OF = {
    "device": ids.DEVICE_ID,
    "digest": ids.DIGEST,
    "model": ids.MODEL_NAME,
    "version": ids.VERSION,
    "rollout": ANY_NAME,
    "token": ANY_NAME,
}
"""The grammars of path parameters that have one."""


@cache
def document() -> dict[str, Any]:
    """The whole document. The routes are those declared when it is first asked for: import `controller.api` before."""
    types = [Problem, *(one for route in ROUTES for one in (*alternatives(route.body), *alternatives(route.answer)))]
    schemas, components = msgspec.json.schema_components(types, schema_hook=_anything, ref_template=REF_TEMPLATE)
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Edgeferry controller", "version": version("edgeferry")},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "responses": {"Problem": _content(CONTENT_TYPE, schema_of[Problem], "What went wrong (RFC 9457)")},
        },
    }


def operation_id(route: Route) -> str:
    """A stable name for generated clients: the handler's module and name."""
    return f"{route.handler.__module__.rpartition('.')[2]}_{route.handler.__name__}"


def _anything(kind: type) -> dict[str, Any]:
    if kind is object:
        return {"description": "any JSON value"}  # msgspec takes an empty schema for none
    raise NotImplementedError


def alternatives(declared: Any) -> tuple[Any, ...]:
    """The types that an annotation allows; none for None. (msgspec has no unions of untagged structs.)"""
    parts = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    return tuple(part for part in parts if part not in {None, type(None)})


def _operation(route: Route, schema_of: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": operation_id(route),
        "summary": route.summary,
        "parameters": [*map(_path_parameter, route.parameters), *_query_parameters(route), *_header_parameters(route)],
        "responses": {
            **{str(status): _success(route, status, schema_of) for status in route.statuses},
            "default": {"$ref": "#/components/responses/Problem"},
        },
        "security": [{"bearer": []}] if route.roles else [],
    }
    if route.roles:
        operation["x-roles"] = list(route.roles)
    if route.consumes != JSON:
        operation["requestBody"] = {"required": True, "content": {route.consumes: {}}}
    elif route.body is not None:
        required = any(field.required for field in msgspec.structs.fields(route.body))
        operation["requestBody"] = {"required": required, "content": {JSON: {"schema": schema_of[route.body]}}}
    return operation


def _path_parameter(name: str) -> dict[str, Any]:
    schema = {"type": "string", "pattern": f"^{PATTERN_OF[name].pattern}$"}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    if route.query is None:
        return []
    _, components = msgspec.json.schema_components([route.query], ref_template=REF_TEMPLATE)
    described = components[route.query.__name__]
    required = described.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": schema}
        for name, schema in described["properties"].items()
    ]


def _header_parameters(route: Route) -> list[dict[str, Any]]:
    if not route.mutates or not route.roles:
        return []
    return [{"name": HEADER, "in": "header", "required": False, "schema": KEY_SCHEMA}]


def _success(route: Route, status: int, schema_of: dict[Any, Any]) -> dict[str, Any]:
    if status in {204, 304}:
        return {"description": "No content" if status == 204 else "Not modified"}
    schemas = [schema_of[one] for one in alternatives(route.answer)]
    schema = {"anyOf": schemas} if len(schemas) > 1 else next(iter(schemas), {})
    return _content(route.produces, schema, _describe(route.answer) or route.summary)


def _content(media_type: str, schema: Any, description: str) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema} if schema else {}}}


def _describe(answer: Any) -> str:
    own = answer.__doc__ if isinstance(answer, type) and issubclass(answer, View | Request) else None
    return re.sub(r"\s+", " ", own).strip() if own else ""
