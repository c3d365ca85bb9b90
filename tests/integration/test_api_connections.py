"""The inference API's own HTTP: what comes over a socket, whole, in pieces, slowly, wrongly or never."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from edge_agent.inference import connection, listening, reading
from edge_agent.inference.bodies import BodyLimits
from edge_agent.inference.http import inference_app
from edge_agent.inference.listening import Listener, listen
from edge_agent.inference.web import Reply
from tests.conftest import eventually
from tests.integration.small_models import MODEL, Bench, adder

PATH = f"/v2/models/{MODEL}/infer"
LIMITS = BodyLimits(body_bytes_max=200_000, bodies_bytes_max=300_000)
PATIENCE_S = 30


def asked(value: float, *headers: str, rows: int = 1) -> bytes:
    """A request for `value` + 1, `rows` times."""
    data = [value] * (4 * rows)
    body = json.dumps({"inputs": [{"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": data}]}).encode()
    return head("POST", PATH, f"Content-Length: {len(body)}", *headers) + body


def binary(value: float) -> bytes:
    """The same with binary tensors: every such request has the same head."""
    array = np.full((1, 4), value, np.float32)
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": array.nbytes}}
    start = json.dumps({"inputs": [tensor]}).encode()
    length = f"Content-Length: {len(start) + array.nbytes}"
    return head("POST", PATH, length, f"Inference-Header-Content-Length: {len(start)}") + start + array.tobytes()


def head(method: str, path: str, *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: device", *headers, "", ""]).encode()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def value(self) -> float:
        """What the model answered first."""
        assert self.status == 200, self.body
        return float(json.loads(self.body)["outputs"][0]["data"][0])

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


class Caller:
    """A client that sends what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            if len(pieces) > 1:
                await asyncio.sleep(0.001)

    async def answer(self, *, bodiless: bool = False) -> Answer:
        """The next answer."""
        async with asyncio.timeout(PATIENCE_S):
            start, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            length = 0 if bodiless else int(headers.get("content-length", "0"))
            return Answer(int(start.split()[1]), headers, await self.reader.readexactly(length))

    async def closed(self) -> bool:
        """Whether the server ends the connection, and says no more."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                return await self.reader.read() == b""
            return True


class Place(NamedTuple):
    """A listening API and its server."""

    bench: Bench
    listener: Listener
    path: Path

    async def caller(self) -> Caller:
        port = int(self.listener.url.rpartition(":")[2])
        return Caller(*await asyncio.open_connection("127.0.0.1", port))

    async def local_caller(self) -> Caller:
        return Caller(*await asyncio.open_unix_connection(str(self.path)))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    bench = Bench(tmp_path, workers=2, queue=4)
    await bench.add(1)
    path = tmp_path / "inference.sock"
    listener = await listen(inference_app(bench.server, dict, LIMITS), "127.0.0.1", 0, path)
    yield Place(bench, listener, path)
    bench.engine.open.set()
    await listener.close()
    await bench.server.close()


async def test_requests_in_one_piece_are_answered_in_their_order(place: Place) -> None:
    caller = await place.caller()
    await caller.send(b"".join(asked(value) for value in range(8)) + head("GET", "/v2/health/live") + asked(9))
    assert [(await caller.answer()).value for _ in range(8)] == [value + 1.0 for value in range(8)]
    assert json.loads((await caller.answer()).body) == {"live": True}
    assert (await caller.answer()).value == 10.0


async def test_a_request_that_comes_byte_by_byte_is_answered(place: Place) -> None:
    caller = await place.local_caller()
    await caller.send(*(bytes([byte]) for byte in asked(4)))
    assert (await caller.answer()).value == 5.0


async def test_a_flood_of_pipelined_requests_is_answered_in_part_and_ended(place: Place) -> None:
    caller = await place.caller()
    await caller.send(asked(1) * 40)
    answers = [await caller.answer() for _ in range(reading.PIPELINED_MAX)]
    assert {answer.value for answer in answers} == {2.0}
    assert (answers[-1].headers["connection"], await caller.closed()) == ("close", True)


async def test_a_body_in_chunks_with_trailers_is_read_and_its_trailers_are_no_headers(place: Place) -> None:
    caller = await place.caller()
    body = asked(6).partition(b"\r\n\r\n")[2]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:50], body[50:])) + b"0\r\n"
    await caller.send(head("POST", PATH, "Transfer-Encoding: chunked") + chunks + b"Content-Encoding: gzip\r\n\r\n")
    assert (await caller.answer()).value == 7.0
    await caller.send(asked(7))
    assert (await caller.answer()).value == 8.0


async def test_who_asks_whether_to_send_the_body_is_told(place: Place) -> None:
    caller = await place.caller()
    start, _, body = asked(1, "Expect: 100-continue").partition(b"\r\n\r\n")
    await caller.send(start + b"\r\n\r\n")
    assert (await caller.answer()).status == 100
    await caller.send(body)
    assert (await caller.answer()).value == 2.0
    await caller.send(start.replace(b"adder", b"other") + b"\r\n\r\n")
    assert (await caller.answer()).status == 404
    assert await caller.closed()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"no http at all\r\n\r\n", 400),
        (head("POST", PATH, "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
        (head("POST", PATH, "Content-Length: 5", "Content-Length: 6") + b"12345", 400),
        (head("POST", PATH, "Content-Length: -5"), 400),
        (head("POST", PATH, "Transfer-Encoding: chunked") + b"zz\r\n", 400),
        (head("GET", "/v2/\xff".encode().decode("latin-1")), 400),
        (b"GET /v2 HTTP/1.1\r\nX: " + b"y" * 2 * listening.RECEIVE_BYTES, 431),
        (head("POST", PATH, "Content-Length: 200001"), 413),
        (head("POST", PATH, "Transfer-Encoding: chunked") + b"40000\r\n" + b"x" * 0x40000 + b"\r\n", 413),
        (head("POST", PATH, "Content-Length: 9", "Content-Encoding: br"), 400),
        (head("POST", "/v2/models/other/infer", "Content-Length: 100000"), 404),
        (head("POST", PATH, "Upgrade: h2c", "Connection: Upgrade", "Content-Length: 3") + b"abc", 400),
    ],
)
async def test_what_cannot_be_read_is_answered_and_the_connection_ended(place: Place, sent: bytes, status: int) -> None:
    caller = await place.caller()
    await caller.send(sent)
    answer = await caller.answer()
    assert (answer.status, answer.headers["connection"], bool(answer.error)) == (status, "close", True)
    assert await caller.closed()
    other = await place.caller()
    await other.send(asked(1))
    assert (await other.answer()).value == 2.0


async def test_a_refused_request_that_came_in_whole_leaves_the_connection_usable(place: Place) -> None:
    caller = await place.caller()
    for wrong, status in (
        (asked(1).replace(b"adder", b"other"), 404),
        (asked(1, "Inference-Header-Content-Length: x"), 400),
        (head("GET", "/" + "x" * reading.HEAD_BYTES_MAX), 431),
        (head("GET", "/v2", *(f"X-{n}: {'y' * 200}" for n in range(300))), 431),
    ):
        await caller.send(wrong)
        assert (await caller.answer()).status == status
    await caller.send(asked(1))
    assert (await caller.answer()).value == 2.0


async def test_another_protocol_is_offered_in_vain(place: Place) -> None:
    caller = await place.caller()
    await caller.send(head("GET", "/v2/health/live", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"))
    assert json.loads((await caller.answer()).body) == {"live": True}


async def test_old_and_closing_clients_are_understood(place: Place) -> None:
    for version, wish, stays in (("1.0", "Accept: */*", False), ("1.1", "Connection: close", False)):
        caller = await place.caller()
        await caller.send(head("GET", "/v2/health/live", wish, version=version))
        assert (await caller.answer()).headers["connection"] == "close"
        assert await caller.closed() is not stays
    caller = await place.caller()
    for _ in range(2):
        await caller.send(head("GET", "/v2/health/live", "Connection: keep-alive", version="1.0"))
        assert (await caller.answer()).headers["connection"] == "keep-alive"


async def test_a_head_request_gets_no_body(place: Place) -> None:
    caller = await place.caller()
    await caller.send(head("HEAD", "/v2/health/live") + asked(1))
    assert (await caller.answer(bodiless=True)).status == 405
    assert (await caller.answer()).value == 2.0


async def test_equal_heads_with_other_bodies_get_other_answers(place: Place) -> None:
    caller = await place.caller()
    for value in (1, 2, 3, 3, 4):
        await caller.send(binary(value))
        assert (await caller.answer()).value == value + 1.0
    first, second = binary(5), binary(6)
    await caller.send(first[:100], first[100:] + second[:200], second[200:])
    assert [(await caller.answer()).value, (await caller.answer()).value] == [6.0, 7.0]


async def test_a_known_head_is_no_way_around_a_model_that_is_gone(place: Place) -> None:
    caller = await place.caller()
    for _ in range(2):
        await caller.send(binary(1))
        assert (await caller.answer()).value == 2.0
    await place.bench.put("2", lambda path: adder(path, 5))
    await caller.send(binary(1))
    assert (await caller.answer()).value == 6.0
    await place.bench.server.retire(MODEL)
    await caller.send(binary(1))
    assert (await caller.answer()).status == 404


@pytest.mark.parametrize(
    "start", [b"\r\n\r\n", b"POST " + PATH.encode() + b" HTTP/1.1\nContent-Length: 8\n\nab\r\n\r\ncd"]
)
async def test_bytes_that_look_like_the_end_of_a_head_teach_nothing(place: Place, start: bytes) -> None:
    """What follows is no body of an earlier request, whatever stood before the blank line."""
    for _ in range(2):
        caller = await place.caller()
        await caller.send(start + asked(1))
        answer = await caller.answer()
        assert answer.status == 400 if start.startswith(b"POST") else answer.value == 2.0


async def test_a_caller_who_is_slow_to_send_is_told_and_shut_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.1)
    monkeypatch.setattr(connection, "BODY_S", 0.1)
    for part in (asked(1)[:20], asked(1)[:-1]):
        caller = await place.caller()
        await caller.send(part)
        answer = await caller.answer()
        assert (answer.status, await caller.closed()) == (408, True)


async def test_a_silent_connection_is_ended_and_a_busy_one_is_not(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.1)
    place.bench.engine.open.clear()
    busy, silent = await place.caller(), await place.caller()
    arrived = place.bench.engine.arrived
    await busy.send(asked(1))
    await eventually(lambda: place.bench.engine.arrived > arrived, "the request runs")
    assert await silent.closed()
    place.bench.engine.open.set()
    assert (await busy.answer()).value == 2.0


async def test_who_does_not_read_the_answer_holds_up_nobody(place: Place) -> None:
    slow, other = await place.local_caller(), await place.caller()
    slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
    sending = asyncio.create_task(slow.send(asked(0.12345, rows=2000) * 40))  # more than all buffers hold
    await asyncio.sleep(0.2)
    for _ in range(3):
        await other.send(asked(1))
        assert (await other.answer()).value == 2.0
    assert not sending.done(), "the server reads no further while its answers are not read"
    slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
    for _ in range(40):
        assert len(json.loads((await slow.answer()).body)["outputs"][0]["data"]) == 8000
    await sending


async def test_one_connection_too_many_is_told_to_come_back(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "CONNECTIONS_MAX", 1)
    first = await place.caller()
    await first.send(asked(1))
    assert (await first.answer()).value == 2.0
    second = await place.caller()
    answer = await second.answer()
    assert (answer.status, answer.headers["retry-after"], answer.error) == (503, "1", "too many connections")
    first.writer.close()
    await first.writer.wait_closed()

    async def served() -> bool:
        caller = await place.caller()
        await caller.send(asked(1))
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            return (await caller.answer()).status == 200
        return False

    for _ in range(100):
        if await served():
            break
        await asyncio.sleep(0.05)
    else:
        pytest.fail("nobody is served any more")


@pytest.mark.parametrize("local", [False, True])
async def test_callers_who_leave_take_their_waiting_requests_along(place: Place, local: bool) -> None:
    engine = place.bench.engine
    engine.open.clear()
    arrived = engine.arrived
    connect: Callable[[], Any] = place.local_caller if local else place.caller
    running, waiting = [await connect() for _ in range(2)], [await connect() for _ in range(4)]
    for caller in running:
        await caller.send(asked(1))
    await eventually(lambda: engine.arrived == arrived + 2, "both cores are busy")
    for caller in waiting:
        await caller.send(asked(2))
    await eventually(lambda: place.bench.server._flow._dispatcher.waiting == 4, "four wait")
    for caller in waiting:
        caller.writer.close()
    await eventually(lambda: place.bench.server._flow._dispatcher.waiting == 0, "nobody waits any more")
    engine.open.set()
    assert [(await caller.answer()).value for caller in running] == [2.0, 2.0]
    assert engine.arrived == arrived + 2
    assert sum(window.cancelled for window in place.bench.recorder.cut(1.0)) == 4


async def test_what_breaks_after_the_answers_breaks_no_later_request_and_costs_no_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    bench = Bench(tmp_path, workers=1, queue=8)
    await bench.add(1)
    flow = bench.server._flow
    monkeypatch.setattr(flow._answering, "try_together", broken)
    listener = await listen(inference_app(bench.server, dict, LIMITS), "127.0.0.1", 0)
    place = Place(bench, listener, tmp_path)
    callers = [await place.caller() for _ in range(5)]
    for turn in range(3):
        bench.engine.open.clear()
        arrived = bench.engine.arrived
        await callers[0].send(asked(10 * turn))
        await eventually(lambda before=arrived: bench.engine.arrived > before, "the core is busy")  # type: ignore[misc]
        for number, caller in enumerate(callers[1:], 1):
            await caller.send(asked(10 * turn + number))
        await eventually(lambda: flow._dispatcher.waiting == len(callers) - 1, "the others wait")
        bench.engine.open.set()
        answers = [(await caller.answer()).value for caller in callers]
        assert answers == [10 * turn + number + 1.0 for number in range(len(callers))]
    await eventually(lambda: flow._dispatcher.busy == 0, "the core is free")
    await listener.close()
    await bench.server.close()


async def test_an_answer_that_cannot_be_written_ends_its_connection_only(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = connection.Connection._head

    def short_of_memory(one: connection.Connection, reply: Reply, incoming: reading.Incoming) -> bytes:
        if b"[5.0," in reply.body:
            raise MemoryError
        return written(one, reply, incoming)

    monkeypatch.setattr(connection.Connection, "_head", short_of_memory)
    engine, dispatcher = place.bench.engine, place.bench.server._flow._dispatcher
    engine.open.clear()
    arrived = engine.arrived
    callers = [await place.caller() for _ in range(6)]
    for caller, value in zip(callers[:2], (1, 2), strict=True):
        await caller.send(asked(value))
    await eventually(lambda: engine.arrived == arrived + 2, "both cores are busy")
    for caller, value in zip(callers[2:], (3, 4, 5, 6), strict=True):
        await caller.send(asked(value))
    await eventually(lambda: dispatcher.waiting == 4, "four wait")
    engine.open.set()
    assert await callers[3].closed()
    heard = [caller for caller in callers if caller is not callers[3]]
    assert [(await caller.answer()).value for caller in heard] == [2.0, 3.0, 4.0, 6.0, 7.0]
    await eventually(lambda: dispatcher.busy == 0, "the cores are free")


async def test_models_that_hang_on_all_cores_leave_the_rest_of_the_api_and_the_watchdog_alive(place: Place) -> None:
    engine = place.bench.engine
    arrived = engine.arrived
    await asyncio.wait_for(place.bench.server.pulse(), PATIENCE_S)
    engine.open.clear()
    stuck = [await place.caller() for _ in range(2)]
    for caller in stuck:
        await caller.send(asked(1))
    await eventually(lambda: engine.arrived == arrived + 2, "both cores are busy")
    for _ in range(4):
        caller = await place.caller()
        await caller.send(head("GET", "/v2/health/live"))
        assert json.loads((await caller.answer()).body) == {"live": True}
    pulse = asyncio.ensure_future(place.bench.server.pulse())
    waiting = [await place.caller() for _ in range(5)]
    for caller in waiting:
        await caller.send(asked(2))
    refused = await asyncio.wait_for(_first(waiting), PATIENCE_S)
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert not pulse.done(), "the watchdog must notice that no core comes back"
    engine.open.set()
    assert [(await caller.answer()).value for caller in stuck] == [2.0, 2.0]
    await asyncio.wait_for(pulse, PATIENCE_S)


async def until_turns_are_kept(place: Place, callers: list[Caller]) -> None:
    """Return when requests of a row are known to be short."""
    turns = place.listener._turns
    async with asyncio.timeout(PATIENCE_S):
        while not turns.watched or turns.runs < 100:
            for caller in callers:
                await caller.send(asked(1))
            assert [(await caller.answer()).value for caller in callers] == [2.0] * len(callers)


async def test_a_model_that_was_short_until_it_hangs_leaves_the_rest_of_the_api_alive(place: Place) -> None:
    engine = place.bench.engine
    callers = [await place.caller() for _ in range(3)]

    await until_turns_are_kept(place, callers)
    for stuck, caller in enumerate(callers[:2], 1):
        arrived = engine.arrived
        engine.open.clear()
        await caller.send(asked(1))
        await eventually(lambda before=arrived: engine.arrived > before, f"{stuck} cores are busy")  # type: ignore[misc]
        other = await place.caller()
        await other.send(head("GET", "/v2/health/live"))
        assert json.loads((await other.answer()).body) == {"live": True}
    engine.open.set()
    assert [(await caller.answer()).value for caller in callers[:2]] == [2.0, 2.0]


async def test_a_request_of_another_size_is_not_taken_for_short(place: Place) -> None:
    callers = [await place.caller() for _ in range(3)]
    await until_turns_are_kept(place, callers)
    engine, runs = place.bench.engine, place.listener._turns.runs
    arrived = engine.arrived
    engine.open.clear()
    await callers[0].send(asked(1, rows=40))
    await eventually(lambda: engine.arrived > arrived, "the core is busy")
    assert place.listener._turns.runs == runs, "no turn is kept for it"
    engine.open.set()
    assert (await callers[0].answer()).value == 2.0


async def _first(callers: list[Caller]) -> Answer:
    tasks = [asyncio.ensure_future(caller.answer()) for caller in callers]
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
    return done.pop().result()


async def test_a_server_that_stops_answers_what_is_under_way_and_ends_the_rest(place: Place) -> None:
    engine = place.bench.engine
    arrived = engine.arrived
    idle, busy = await place.caller(), await place.caller()
    engine.open.clear()
    await busy.send(asked(1))
    await eventually(lambda: engine.arrived > arrived, "the request runs")
    closing = asyncio.create_task(place.listener.close())
    assert await idle.closed()
    with pytest.raises(OSError):
        await place.caller()
    engine.open.set()
    answer = await busy.answer()
    assert (answer.value, answer.headers["connection"], await busy.closed()) == (2.0, "close", True)
    await closing
