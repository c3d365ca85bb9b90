"""Devices over HTTP: joining, labels, orders to poll, and who may do what."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from common.ids import DeviceId
from common.trust import verify
from common.wire import DesiredState, JoinString, ReportedState
from common.wire.messages import DESIRED_PAYLOAD_TYPE
from controller.api.auth import fingerprint
from controller.resources import Join, Joined
from tests.integration.api_peer import CAPABILITIES, ApiPeer, serving


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[ApiPeer]:
    async with serving(tmp_path) as peer:
        yield peer


def asking(name: str | None = None) -> bytes:
    return msgspec.json.encode(Join(name=name, capabilities=CAPABILITIES))


async def test_a_device_joins_and_is_known_with_its_labels_and_first_order(api: ApiPeer) -> None:
    claim = await api.claim(labels={"site": "oslo"})
    reply = await api.ask("POST", "/v1/join", data=asking("cam-1"), token=claim)
    joined = msgspec.json.decode(reply.body, type=Joined)
    shown = (await api.ask("GET", "/v1/devices/cam-1")).json()
    order = await api.ask("GET", "/v1/devices/cam-1/desired", token=joined.device_token)
    payload = verify(order.body, DESIRED_PAYLOAD_TYPE, joined.signing_keys)
    desired = msgspec.json.decode(payload, type=DesiredState)
    assert (reply.status, joined.device, joined.broker.username) == (201, "cam-1", "cam-1")
    assert api.admitted == [("cam-1", joined.broker.password)]
    assert (shown["labels"], shown["presence"], shown["in_sync"]) == ({"site": "oslo"}, "never_seen", True)
    assert (desired.device, desired.generation, desired.models) == ("cam-1", 1, ())


async def test_polling_costs_a_304_until_there_is_news(api: ApiPeer) -> None:
    token = (await api.join("cam-1")).device_token
    first = await api.ask("GET", "/v1/devices/cam-1/desired", token=token)
    etag = first.headers["ETag"]
    again = await api.ask("GET", "/v1/devices/cam-1/desired", token=token, headers={"If-None-Match": etag})
    other = await api.ask("GET", "/v1/devices/cam-1/desired", token=token, headers={"If-None-Match": '"old"'})
    assert first.headers["Content-Type"] == "application/vnd.edgeferry.order+json"
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", etag)
    assert (other.status, other.body) == (200, first.body)


async def test_a_device_speaks_for_itself_only(api: ApiPeer) -> None:
    token = (await api.join("cam-1")).device_token
    await api.join("cam-2")
    foreign = await api.ask("GET", "/v1/devices/cam-2/desired", token=token)
    fleet = await api.ask("GET", "/v1/devices", token=token)
    assert [reply.problem()["code"] for reply in (foreign, fleet)] == ["forbidden", "forbidden"]


async def test_a_join_that_is_repeated_with_its_key_gets_the_same_identity(api: ApiPeer) -> None:
    claim = await api.claim()
    key = {"Idempotency-Key": "k" * 32}
    first = await api.ask("POST", "/v1/join", data=asking(), token=claim, headers=key)
    again = await api.ask("POST", "/v1/join", data=asking(), token=claim, headers=key)
    joined = msgspec.json.decode(first.body, type=Joined)
    assert (again.status, again.body) == (201, first.body)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert api.admitted == [(joined.device, joined.broker.password)] * 2
    assert len((await api.ask("GET", "/v1/devices")).json()["items"]) == 1


async def test_a_claim_lets_in_as_many_as_it_says_even_at_once(api: ApiPeer) -> None:
    claim = await api.claim(uses=2)
    replies = await asyncio.gather(*(api.ask("POST", "/v1/join", data=asking(), token=claim) for _ in range(4)))
    assert sorted(reply.status for reply in replies) == [201, 201, 401, 401]
    refused = next(reply for reply in replies if reply.status == 401)
    assert refused.problem()["field"] == "join string"
    assert refused.headers["WWW-Authenticate"].startswith("Bearer")


async def test_a_name_that_is_taken_is_a_conflict_and_costs_no_use(api: ApiPeer) -> None:
    await api.join("cam-1")
    claim = await api.claim()
    taken = await api.ask("POST", "/v1/join", data=asking("cam-1"), token=claim)
    free = await api.ask("POST", "/v1/join", data=asking("cam-2"), token=claim)
    assert (taken.status, taken.problem()["field"], free.status) == (409, "name", 201)


async def test_a_withdrawn_claim_lets_nobody_in(api: ApiPeer) -> None:
    claim = await api.claim()
    (listed,) = (await api.ask("GET", "/v1/join-tokens")).json()["items"]
    withdrawn = await api.ask("DELETE", f"/v1/join-tokens/{listed['id']}")
    again = await api.ask("DELETE", f"/v1/join-tokens/{listed['id']}")
    refused = await api.ask("POST", "/v1/join", data=asking(), token=claim)
    assert (withdrawn.status, again.status, refused.status) == (204, 404, 401)


async def test_an_expired_claim_lets_nobody_in(api: ApiPeer) -> None:
    refused = await api.ask("POST", "/v1/join", data=asking(), token=await api.claim(ttl_s=1e-6))
    assert (refused.status, "expired" in refused.problem()["detail"]) == (401, True)


async def test_a_claim_is_worth_joining_and_nothing_else(api: ApiPeer) -> None:
    claim = await api.claim()
    assert (await api.ask("GET", "/v1/devices", token=claim)).status == 403
    assert (await api.ask("POST", "/v1/join", data=asking(), token=api.token)).status == 403


async def test_labels_are_merged_guarded_and_checked(api: ApiPeer) -> None:
    await api.join("cam-1", site="oslo", rack="7")
    etag = (await api.ask("GET", "/v1/devices/cam-1")).headers["ETag"]
    body = {"labels": {"rack": None, "ring": "canary"}}
    changed = await api.ask("PATCH", "/v1/devices/cam-1", json=body, headers={"If-Match": etag})
    stale = await api.ask("PATCH", "/v1/devices/cam-1", json=body, headers={"If-Match": etag})
    bad = await api.ask("PATCH", "/v1/devices/cam-1", json={"labels": {"No!": "x"}})
    assert changed.json()["labels"] == {"site": "oslo", "ring": "canary"}
    assert changed.headers["ETag"] != etag
    assert (stale.status, stale.problem()["field"]) == (412, "If-Match")
    assert (bad.status, bad.problem()["field"]) == (400, "labels key")


async def test_devices_are_selected_and_paged(api: ApiPeer) -> None:
    for number in range(5):
        await api.join(f"cam-{number}", site="oslo" if number % 2 else "bergen")
    query = {"selector": 'labels.site == "bergen"', "limit": "2"}
    first = (await api.ask("GET", "/v1/devices", params=query)).json()
    second = (await api.ask("GET", "/v1/devices", params={**query, "after": first["next"]})).json()
    assert [item["id"] for item in first["items"]] == ["cam-0", "cam-2"]
    assert ([item["id"] for item in second["items"]], second["next"]) == (["cam-4"], None)


async def test_a_bad_selector_is_refused_with_position_and_reason(api: ApiPeer) -> None:
    reply = await api.ask("GET", "/v1/devices", params={"selector": 'labels.site == == "x"'})
    problem = reply.problem()
    assert (reply.status, problem["field"]) == (400, "selector")
    assert "16" in problem["detail"]
    assert problem["fix"]


async def test_a_device_reports_over_http_while_mqtt_is_silent(api: ApiPeer) -> None:
    token = (await api.join("cam-1")).device_token
    state = ReportedState(device=DeviceId("cam-1"), epoch=1, seq=1, sent_at=0.0, generation=1)
    path = "/v1/devices/cam-1/reported"
    told = await api.ask("PUT", path, data=msgspec.json.encode(state), token=token)
    foreign = msgspec.structs.replace(state, device=DeviceId("cam-2"))
    lied = await api.ask("PUT", path, data=msgspec.json.encode(foreign), token=token)
    newer = await api.ask("PUT", path, data=msgspec.json.encode(msgspec.structs.replace(state, v=99)), token=token)
    shown = (await api.ask("GET", "/v1/devices/cam-1")).json()
    assert (told.status, told.body) == (204, b"")
    assert (lied.status, newer.status, newer.problem()["field"]) == (400, 400, "v")
    assert shown["reported"]["seq"] == 1


async def test_no_secret_is_logged_or_stored(api: ApiPeer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = {"Idempotency-Key": "a-key"}
    made = (await api.ask("POST", "/v1/join-tokens", json={}, headers=key)).json()["join_string"]
    claim = JoinString.parse(made).token
    joined = await api.ask("POST", "/v1/join", data=asking("cam-1"), token=claim, headers=key)
    secrets = [made, claim, joined.json()["device_token"], joined.json()["broker"]["password"], api.token]
    audit = (await api.ask("GET", "/v1/audit")).body.decode()
    database = b"".join(path.read_bytes() for path in api.folder.glob("ferry.db*"))
    for secret in secrets:
        assert secret not in caplog.text
        assert secret not in audit
        assert secret.encode() not in database
    assert fingerprint(claim).encode() in database
