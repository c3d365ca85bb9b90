"""What holds for every route: problems, tokens, health, the audit log, and a document that is true."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.errors import Unavailable
from controller.api.openapi import document
from controller.api.route import ROUTES
from tests.integration.api_peer import ApiPeer, serving

JSON_BODY = 300 * 1024


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[ApiPeer]:
    async with serving(tmp_path) as peer:
        yield peer


async def test_a_wrong_path_and_a_wrong_method_are_problems_too(api: ApiPeer) -> None:
    lost, wrong = await api.ask("GET", "/v1/nothing"), await api.ask("DELETE", "/v1/rollouts")
    assert (lost.status, lost.problem()["code"]) == (404, "not_found")
    assert (wrong.status, wrong.problem()["code"]) == (405, "method_not_allowed")
    assert set(wrong.headers["Allow"].split(",")) == {"GET", "POST"}


@pytest.mark.parametrize("token", ["", "wrong", "ferrya_" + "x" * 300])
async def test_without_a_valid_token_nothing_is_answered(api: ApiPeer, token: str) -> None:
    reply = await api.ask("GET", "/v1/devices", token=token)
    assert (reply.status, reply.problem()["code"]) == (401, "unauthenticated")
    assert reply.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"null", b'{"labels": {"a": 1}}'])
async def test_a_body_that_is_not_what_is_asked_for_is_400(api: ApiPeer, body: bytes) -> None:
    await api.join("cam-1")
    reply = await api.ask("PATCH", "/v1/devices/cam-1", data=body)
    assert (reply.status, reply.problem()["code"]) == (400, "invalid_input")


async def test_a_body_that_is_too_large_is_413(api: ApiPeer) -> None:
    reply = await api.ask("POST", "/v1/join-tokens", data=b'"' + b"x" * JSON_BODY + b'"')
    assert (reply.status, reply.problem()["field"]) == (413, "body")


@pytest.mark.parametrize("key", ["", "x" * 129, "ø"])
async def test_an_unusable_idempotency_key_is_refused(api: ApiPeer, key: str) -> None:
    reply = await api.ask("POST", "/v1/join-tokens", json={}, headers={"Idempotency-Key": key})
    assert (reply.status, reply.problem()["field"]) == (400, "Idempotency-Key")


async def test_a_problem_carries_the_callers_trace(api: ApiPeer) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    reply = await api.ask("GET", "/v1/devices/none", headers={"traceparent": trace})
    assert reply.problem()["trace_id"] == "0af7651916cd43dd8448eb211c80319c"


async def test_health_is_told_without_a_token_and_shows_a_store_that_is_gone(api: ApiPeer) -> None:
    well = await api.ask("GET", "/v1/health", token="")
    await api.store.close()
    ill = await api.ask("GET", "/v1/health", token="")
    assert (well.status, well.json()["status"], well.json()["parts"]["store"]) == (200, "ok", "ok")
    assert (ill.status, ill.json()["status"]) == (503, "degraded")


async def test_a_store_that_is_gone_is_a_503_with_a_time_to_retry(api: ApiPeer) -> None:
    await api.store.close()
    reply = await api.ask("GET", "/v1/devices")
    assert (reply.status, reply.problem()["code"]) == (503, Unavailable.code)
    assert int(reply.headers["Retry-After"]) > 0


async def test_the_audit_log_is_read_newest_first_in_pages(api: ApiPeer) -> None:
    for number in range(3):
        await api.join(f"cam-{number}")
    first = (await api.ask("GET", "/v1/audit?limit=4")).json()
    second = (await api.ask("GET", f"/v1/audit?limit=4&after={first['next']}")).json()
    seqs = [entry["seq"] for entry in (*first["items"], *second["items"])]
    bad = await api.ask("GET", "/v1/audit?after=x")
    assert seqs == [6, 5, 4, 3, 2, 1]
    assert {entry["action"] for entry in first["items"]} == {"device.join", "join_token.create"}
    assert (bad.status, bad.problem()["field"]) == (400, "after")


async def test_the_document_names_every_route_and_resolves_every_reference(api: ApiPeer) -> None:
    served = (await api.ask("GET", "/v1/openapi.json", token="")).json()
    operations = {(path, method) for path, methods in served["paths"].items() for method in methods}
    names = [operation["operationId"] for methods in served["paths"].values() for operation in methods.values()]
    assert served == json.loads(json.dumps(document()))
    assert operations == {(route.path, route.method.lower()) for route in ROUTES}
    assert len(set(names)) == len(names)
    for reference in _references(served):
        target: object = served
        for step in reference.removeprefix("#/").split("/"):
            assert isinstance(target, dict)
            target = target[step]


def _references(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for part in value.values() for found in _references(part)]
    return [found for part in value for found in _references(part)] if isinstance(value, list) else []
