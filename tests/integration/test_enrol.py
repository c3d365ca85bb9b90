"""Joining, against the real API: once, privately, and the same again when the answer got lost."""

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.artifact.manifest import DEFAULT_VARIANT
from common.errors import Conflict, FerryError, IntegrityFailure, InvalidInput, NotFound, Unauthenticated, Unavailable
from common.ids import DeviceId
from common.wire import Capabilities, JoinString, ReportedState
from edge_agent.enrol import PENDING_FILE, join
from edge_agent.fetch import DesiredPoll, Envelope, NotModified, open_session
from edge_agent.identity import Identity, identity_path, load_identity
from edge_agent.journal import AcceptedOrder, Journal
from tests.blob_server import BlobServer
from tests.faults import FaultProxy
from tests.integration.api_peer import ApiPeer, serving

CAPABILITIES = Capabilities(agent_version="test", variants=(DEFAULT_VARIANT,))


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[ApiPeer]:
    folder = tmp_path / "controller"
    folder.mkdir()
    async with serving(folder) as api:
        yield api


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "agent"
    folder.mkdir()
    return folder


def port_of(api: ApiPeer) -> int:
    return int(api.url.rpartition(":")[2])


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_a_device_that_joined_has_a_private_identity_that_the_controller_knows(api: ApiPeer, data: Path) -> None:
    word = str(JoinString(api.url, await api.claim(labels={"line": "a"})))

    identity = await join(word, data, capabilities=CAPABILITIES, name="cam-1", labels={"site": "north"})

    assert load_identity(data) == identity
    assert identity.device == "cam-1"
    assert identity.client_id.startswith("cam-1-")
    assert len(identity.client_id) > len("cam-1-") + 15
    assert identity.signing_keys
    assert stat.S_IMODE(identity_path(data).stat().st_mode) == 0o600
    assert files_in(data) == {"identity.json"}
    device = (await api.ask("GET", "/v1/devices/cam-1")).json()
    assert device["labels"] == {"site": "north", "line": "a"}
    assert api.admitted == [("cam-1", identity.broker.password)]


async def test_without_a_name_the_controller_chooses_one(api: ApiPeer, data: Path) -> None:
    identity = await join(str(JoinString(api.url, await api.claim())), data, capabilities=CAPABILITIES)

    assert identity.device


async def test_a_join_whose_answer_got_lost_is_repeated_to_the_same_identity(api: ApiPeer, data: Path) -> None:
    async with FaultProxy(port_of(api)) as proxy:
        word = str(JoinString(f"http://127.0.0.1:{proxy.port}", await api.claim(uses=1)))
        proxy.truncate_after = 1
        with pytest.raises(Unavailable):
            await join(word, data, capabilities=CAPABILITIES, name="cam-1")
        assert files_in(data) == {PENDING_FILE}
        assert stat.S_IMODE((data / PENDING_FILE).stat().st_mode) == 0o600
        proxy.truncate_after = None
        changed = Capabilities(agent_version="newer", variants=(DEFAULT_VARIANT,))

        identity = await join(word, data, capabilities=changed, name="cam-1")

    assert identity.device == "cam-1"
    assert identity.broker.password == api.admitted[0][1]
    async with open_session(identity.device_token) as session:
        assert isinstance(await DesiredPoll(api.url, identity.device, session).poll(None), Envelope)


async def test_another_join_does_not_reuse_the_unfinished_one(api: ApiPeer, data: Path) -> None:
    dead = str(JoinString("http://127.0.0.1:9", "ferryj_x"))
    with pytest.raises(Unavailable):
        await join(dead, data, capabilities=CAPABILITIES, name="cam-1")

    word = str(JoinString(api.url, await api.claim()))
    assert (await join(word, data, capabilities=CAPABILITIES, name="cam-2")).device == "cam-2"


async def test_a_device_that_joined_does_not_join_again_unless_forced_and_then_forgets(
    api: ApiPeer, data: Path
) -> None:
    first = await join(str(JoinString(api.url, await api.claim())), data, capabilities=CAPABILITIES)
    journal = Journal(data / "journal.db")
    journal.accept(AcceptedOrder(generation=57, etag="sha256:x", envelope=b"{}"))
    journal.close()
    word = str(JoinString(api.url, await api.claim()))

    with pytest.raises(Conflict, match="--force"):
        await join(word, data, capabilities=CAPABILITIES)
    assert load_identity(data) == first
    second = await join(word, data, capabilities=CAPABILITIES, force=True)

    assert load_identity(data) == second
    assert second.device != first.device
    journal = Journal(data / "journal.db")
    assert journal.generation == 0  # or the new fleet's orders would look older than the last fleet's
    journal.close()


async def test_what_cannot_be_joined_is_told_and_changes_nothing(api: ApiPeer, data: Path) -> None:
    await api.join("taken")
    claim = await api.claim(uses=1)
    once = str(JoinString(api.url, claim))
    cases: list[tuple[str, str | None, dict[str, str], type[FerryError], str]] = [
        ("ferry1.rubbish", None, {}, InvalidInput, "join string"),
        (once, "Not A Name", {}, InvalidInput, "name"),
        (once, None, {"Bad Key": "x"}, InvalidInput, "labels"),
        (once, "taken", {}, Conflict, "taken"),
        (str(JoinString(api.url, "ferryj_unknown")), None, {}, Unauthenticated, "token"),
        (str(JoinString("http://127.0.0.1:9", claim)), None, {}, Unavailable, "cannot be reached"),
    ]
    for word, name, labels, error, said in cases:
        with pytest.raises(error, match=said):
            await join(word, data, capabilities=CAPABILITIES, name=name, labels=labels)
        assert not identity_path(data).exists()

    assert (await join(once, data, capabilities=CAPABILITIES, name="free")).device == "free"


async def test_a_page_that_is_no_controller_is_told_as_such(data: Path) -> None:
    async with BlobServer() as stranger:
        with pytest.raises(NotFound, match="404"):
            await join(str(JoinString(stranger.url, "t")), data, capabilities=CAPABILITIES)


async def test_a_damaged_identity_is_told_as_such(data: Path) -> None:
    with pytest.raises(NotFound, match="not joined"):
        load_identity(data)
    identity_path(data).write_text("{")
    with pytest.raises(IntegrityFailure, match="damaged"):
        load_identity(data)


async def test_a_poll_costs_an_etag_and_a_report_arrives(api: ApiPeer, data: Path) -> None:
    identity = await join(str(JoinString(api.url, await api.claim())), data, capabilities=CAPABILITIES)
    async with open_session(identity.device_token) as session:
        poll = DesiredPoll(api.url, identity.device, session)
        first = await poll.poll(None)
        assert isinstance(first, Envelope)
        assert first.data.startswith(b"{")
        assert isinstance(await poll.poll(first.etag), NotModified)

        await poll.report(report(identity))
        with pytest.raises(FerryError):
            await DesiredPoll(api.url, DeviceId("another"), session).poll(None)

    device = (await api.ask("GET", f"/v1/devices/{identity.device}")).json()
    assert device["reported"]["generation"] == 1


async def test_polls_and_reports_without_a_controller_are_unavailable(api: ApiPeer, data: Path) -> None:
    identity = await join(str(JoinString(api.url, await api.claim())), data, capabilities=CAPABILITIES)
    async with FaultProxy(port_of(api)) as proxy, open_session(identity.device_token) as session:
        proxy.refuse = True
        poll = DesiredPoll(f"http://127.0.0.1:{proxy.port}", identity.device, session)
        outcomes = await asyncio.gather(poll.poll(None), poll.report(report(identity)), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]


def report(identity: Identity) -> ReportedState:
    return ReportedState(device=identity.device, epoch=1, seq=1, sent_at=1.0, generation=1)
