"""Rollouts over HTTP: planned, created, steered; everything in one unit of work with audit and event."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.api_peer import ApiPeer, Reply, serving, tiny_model

RELEASE = {"model": "detector", "version": "1.0.0"}
THREE_PHASES = [{"percent": 20}, {"percent": 60}, {"percent": 100}]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[ApiPeer]:
    """A fleet of five and a release."""
    async with serving(tmp_path) as peer:
        for number in range(5):
            await peer.join(f"cam-{number}", site="oslo" if number else "bergen")
        await peer.publish("detector", "1.0.0", tiny_model())
        yield peer


async def create(api: ApiPeer, query: str = "", headers: dict[str, str] | None = None, **spec: Any) -> Reply:
    body = {"release": RELEASE, "phases": THREE_PHASES, **spec}
    return await api.ask("POST", f"/v1/rollouts{query}", json=body, headers=headers or {})


async def act(api: ApiPeer, rollout: str, action: str, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await api.ask("POST", f"/v1/rollouts/{rollout}/actions", json={"action": action}, headers=named)


async def test_a_rollout_is_created_with_its_phases_and_executions(api: ApiPeer) -> None:
    reply = await create(api)
    rollout = reply.json()
    shown = await api.ask("GET", f"/v1/rollouts/{rollout['id']}")
    executions = (await api.ask("GET", f"/v1/rollouts/{rollout['id']}/executions")).json()["items"]
    assert (reply.status, shown.headers["ETag"]) == (201, reply.headers["ETag"])
    assert shown.json() == rollout
    assert [phase["devices"] for phase in rollout["phases"]] == [1, 2, 2]
    assert rollout["counts"] == {"queued": 5}
    assert [execution["device"] for execution in executions] == [f"cam-{number}" for number in range(5)]


async def test_a_creation_is_audited_and_announced_in_the_trace_of_the_caller(api: ApiPeer) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    rollout = (await create(api, headers={"traceparent": trace})).json()
    audit = (await api.ask("GET", "/v1/audit")).json()["items"][0]
    events = await api.store.read(lambda tx: tx.journal.events_after(0, 100))
    assert (audit["action"], audit["subject"], audit["actor"]) == ("rollout.create", rollout["id"], "admin:tester")
    assert "rollout.created" in {event.kind for event in events if event.subject == rollout["id"]}
    assert rollout["traceparent"].split("-")[1] == trace.split("-")[1]


async def test_a_dry_run_answers_with_a_preview_and_changes_nothing(api: ApiPeer) -> None:
    reply = await create(api, "?dry_run=true")
    preview = reply.json()
    assert (reply.status, preview["devices"]) == (200, 5)
    assert [phase["devices"] for phase in preview["phases"]] == [1, 2, 2]
    assert preview["bytes"] == preview["full_bytes"] == 5 * len(tiny_model())
    assert (await api.ask("GET", "/v1/rollouts")).json()["items"] == []


@pytest.mark.parametrize(
    ("spec", "status", "field"),
    [
        ({"phases": [{"percent": 50}, {"percent": 20}]}, 400, "phases[1].percent"),
        ({"phases": [{"percent": 50}]}, 400, "phases[0]"),
        ({"phases": []}, 400, "phases"),
        ({"phases": [{"percent": 50, "count": 2}, {"percent": 100}]}, 400, "phases[0]"),
        ({"phases": [{"percent": 101}]}, 400, "phases[0].percent"),
        ({"phases": [{"percent": "x"}]}, 400, "phases[0].percent"),
        ({"selector": 'labels.site = "oslo"'}, 400, "selector"),
        ({"selector": 'lables.site == "oslo"'}, 400, "selector"),
        ({"selector": 'labels.site == "nowhere"'}, 400, "selector"),
        ({"release": {"model": "detector", "version": "9"}}, 404, "release"),
        ({"release": {"model": "../x", "version": "9"}}, 400, "release.model"),
        ({"bake_s": -1}, 400, "bake_s"),
        ({"bakes": 1}, 400, "body"),
    ],
)
async def test_a_bad_spec_is_refused_by_name_with_a_fix_and_changes_nothing(
    api: ApiPeer, spec: dict[str, Any], status: int, field: str
) -> None:
    for reply in (await create(api, **spec), await create(api, "?dry_run=true", **spec)):
        problem = reply.problem()
        assert (reply.status, problem["field"]) == (status, field)
        assert problem["fix"]
        assert problem["trace_id"] is None or len(problem["trace_id"]) == 32
    assert (await api.ask("GET", "/v1/rollouts")).json()["items"] == []


async def test_a_selector_error_says_where(api: ApiPeer) -> None:
    problem = (await create(api, selector='labels.site = "oslo"')).problem()
    assert "12" in problem["detail"] or "13" in problem["detail"]


async def test_the_same_key_gives_the_same_rollout_and_another_request_is_refused(api: ApiPeer) -> None:
    key = {"Idempotency-Key": "create-1"}
    first, again = await create(api, headers=key), await create(api, headers=key)
    misused = await create(api, headers=key, bake_s=5)
    assert (again.status, again.body) == (201, first.body)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["ETag"] == first.headers["ETag"]
    assert (misused.status, misused.problem()["code"]) == (422, "idempotency_key_reused")
    assert len((await api.ask("GET", "/v1/rollouts")).json()["items"]) == 1


async def test_a_refusal_is_not_kept_so_the_repeat_may_succeed(api: ApiPeer) -> None:
    key = {"Idempotency-Key": "create-2"}
    early = await create(api, headers=key, selector='labels.site == "trondheim"')
    await api.join("cam-9", site="trondheim")
    late = await create(api, headers=key, selector='labels.site == "trondheim"')
    assert (early.status, late.status) == (400, 201)


async def test_actions_move_the_rollout_and_are_guarded(api: ApiPeer) -> None:
    created = await create(api)
    rollout = created.json()["id"]
    paused = await act(api, rollout, "pause", If_Match=created.headers["ETag"])
    stale = await act(api, rollout, "resume", If_Match=created.headers["ETag"])
    resumed = await act(api, rollout, "resume", If_Match=paused.headers["ETag"])
    assert paused.json()["state"] == "paused"
    assert (stale.status, stale.problem()["field"]) == (412, "If-Match")
    assert resumed.status == 200
    assert resumed.headers["ETag"] != created.headers["ETag"]


async def test_an_action_that_makes_no_sense_now_is_a_conflict_that_says_what_is_possible(api: ApiPeer) -> None:
    rollout = (await create(api)).json()["id"]
    await act(api, rollout, "abort")
    late, wrong = await act(api, rollout, "pause"), await act(api, rollout, "explode")
    unknown = await act(api, "r-none", "pause")
    problem = late.problem()
    assert (late.status, problem["code"]) == (409, "conflict")
    assert problem["fix"]
    assert (wrong.status, wrong.problem()["field"], unknown.status) == (400, "action", 404)


async def test_a_newer_rollout_takes_the_devices_over(api: ApiPeer) -> None:
    older = (await create(api)).json()["id"]
    newer = (await create(api)).json()["id"]
    listed = (await api.ask("GET", "/v1/rollouts?limit=1")).json()
    rest = (await api.ask("GET", f"/v1/rollouts?after={listed['next']}")).json()
    assert [item["id"] for item in (*listed["items"], *rest["items"])] == [newer, older]
    assert rest["items"][0]["counts"] == {"superseded": 5}
    assert newer in rest["items"][0]["reason"]
