"""Events over HTTP: as they happen, filtered, and resumed without a gap."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import aiohttp
import msgspec
import pytest

from controller.api.events import newest_seq
from controller.store.port import Event, Transaction
from tests.integration.api_peer import ApiPeer, serving

WITHIN_S = 20


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[ApiPeer]:
    async with serving(tmp_path) as peer:
        yield peer


class Stream:
    """An open event stream."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> Event:
        """The next event; fails when none comes."""
        async with asyncio.timeout(WITHIN_S):
            while line := await self.response.content.readline():
                if line.startswith(b"data:"):
                    return msgspec.json.decode(line.removeprefix(b"data:"), type=Event)
        raise AssertionError("the stream ended")

    async def begun(self) -> "Stream":
        async with asyncio.timeout(WITHIN_S):
            assert (await self.response.content.readline()).startswith(b"retry:")
        return self


async def emit(api: ApiPeer, kind: str, subject: str = "s", count: int = 1) -> None:
    def work(tx: Transaction) -> None:
        for number in range(count):
            tx.journal.append_event(Event(kind=kind, subject=subject, at=1.0, data={"number": number}))

    await api.store.write(work)


async def watch(api: ApiPeer, query: str = "", **headers: str) -> Stream:
    sent = {
        "Authorization": f"Bearer {api.token}",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    response = await api.session.get(f"{api.url}/v1/events{query}", headers=sent)
    assert (response.status, response.content_type) == (200, "text/event-stream")
    return await Stream(response).begun()


async def test_a_watcher_sees_what_happens_from_now_on(api: ApiPeer) -> None:
    await emit(api, "device.joined", "old")
    stream = await watch(api)
    await emit(api, "device.joined", "new")
    assert (await stream.next()).subject == "new"


async def test_a_watcher_that_comes_back_misses_nothing(api: ApiPeer) -> None:
    stream = await watch(api)
    await emit(api, "a.b", count=3)
    last = (await stream.next()).seq
    stream.response.close()
    await emit(api, "c.d")
    resumed = await watch(api, Last_Event_ID=str(last))
    assert [(await resumed.next()).seq for _ in range(3)] == [last + 1, last + 2, last + 3]


async def test_more_events_than_fit_one_read_all_arrive_in_order(api: ApiPeer) -> None:
    await emit(api, "many", count=1200)
    stream = await watch(api, "?after=0")
    assert [(await stream.next()).seq for _ in range(1200)] == list(range(1, 1201))


async def test_a_watcher_can_keep_one_family_and_one_subject(api: ApiPeer) -> None:
    for kind, subject in (
        ("rollout.created", "r1"),
        ("rolloutx", "r1"),
        ("rollout.updated", "r2"),
        ("rollout.updated", "r1"),
    ):
        await emit(api, kind, subject)
    stream = await watch(api, "?kind=rollout&subject=r1&after=0")
    assert [(await stream.next()).kind for _ in range(2)] == ["rollout.created", "rollout.updated"]


async def test_a_bad_event_number_is_refused(api: ApiPeer) -> None:
    reply = await api.ask("GET", "/v1/events", headers={"Last-Event-ID": "x"})
    assert (reply.status, reply.problem()["field"]) == (400, "Last-Event-ID")


async def test_watching_needs_an_operator(api: ApiPeer) -> None:
    token = (await api.join("cam-1")).device_token
    assert (await api.ask("GET", "/v1/events", token=token)).status == 403


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 100])
async def test_the_newest_number_is_found_from_any_older_one(api: ApiPeer, count: int) -> None:
    await emit(api, "x", count=count)
    for known in range(count + 1):
        found = await api.store.read(partial(_newest, known=known))
        assert found == count


def _newest(tx: Transaction, known: int) -> int:
    return newest_seq(tx.journal, known)
