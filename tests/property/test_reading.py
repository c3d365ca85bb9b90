"""Requests as bytes: however they are cut, the same requests come out; whatever comes, nothing but answers does."""

import json

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.inference.bodies import BodyLimits
from edge_agent.inference.reading import HEAD_BYTES_MAX, PIPELINED_MAX, Reader
from edge_agent.inference.web import HEADS_MAX, Answerer, Application, Call, Reply, document

LIMITS = BodyLimits(body_bytes_max=4096, bodies_bytes_max=8192)


class Echo:
    """A route that takes everything."""

    def begin(self, call: Call) -> None: ...

    def overfull(self, call: Call) -> None: ...

    def answer(self, call: Call, to: Answerer) -> None:
        to.send(Reply(call.body))


async def nothing(_: Call) -> Reply:
    return document({})


def application() -> Application:
    application = Application(LIMITS)
    application.add("POST", "/echo/{name}", Echo())
    application.add("GET", "/", nothing)
    return application


def read(application: Application, *pieces: bytes) -> tuple[list[tuple[str, str, bytes, bool]], bool]:
    """What came of the requests in `pieces`, of one connection: method, name or error, body, whether it may stay."""
    reader, found = Reader(application), []
    for piece in pieces:
        if reader.broken:
            break
        reader.feed(bytearray(piece), len(piece))
        while reader.complete:
            one = reader.complete.popleft()
            name = type(one.error).__name__ if one.error else one.call.named.get("name", "") if one.call else "?"
            found.append((one.method, name, one.call.body if one.call and not one.error else b"", one.keep))
            one.release()
    broken = reader.broken
    reader.close()
    return found, broken


names = st.sampled_from(["a", "b", "missing/x"])
bodies = st.binary(max_size=64)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    name, body = draw(names), draw(bodies)
    kind = draw(st.sampled_from(["length", "chunks", "get", "old", "large"]))
    if kind == "get":
        return b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    start = f"POST /echo/{name} HTTP/1.1\r\nHost: x\r\n".encode()
    if kind == "chunks":
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return start + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n"
    if kind == "large":
        body = b"x" * 5000
    close = b"Connection: close\r\n" if kind == "old" else b""
    return start + close + b"Content-Length: %d\r\n\r\n" % len(body) + body


@given(st.lists(requests(), min_size=1, max_size=PIPELINED_MAX - 1), st.data())
def test_the_cuts_between_pieces_change_nothing_but_when_a_refusal_is_clear(
    sent: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if b > a]
    shared = application()
    one_by_one, _ = read(shared, *sent)
    again, _ = read(shared, *sent)  # heads are known now
    cut, broken = read(shared, *pieces)
    assert again == one_by_one
    # A request that is refused before all of it is there ends the connection, and nothing after it is read.
    shorter = [(method, name, body) for method, name, body, _ in cut]
    assert shorter == [(method, name, body) for method, name, body, _ in one_by_one][: len(shorter)]
    assert broken or len(shorter) == len(one_by_one)


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_garbage_is_refused_and_never_raises(pieces: list[bytes]) -> None:
    found, _ = read(application(), *pieces)
    assert all(name in {"InvalidInput", "HeadTooLarge", "NoSuchPath", "WrongMethod", ""} for _, name, _, _ in found)


@given(requests(), st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_a_spoiled_request_never_raises_and_holds_no_memory(sent: bytes, place: int, put: bytes) -> None:
    spoiled = sent[:place] + put + sent[place + len(put) :]
    shared = application()
    for _ in range(2):
        read(shared, spoiled, sent)
    assert shared.bodies._held == 0


def test_what_a_head_may_take_is_bounded_however_slowly_it_comes() -> None:
    pieces = [b"GET / HTTP/1.1\r\nX: ", *[b"y" * 100] * (HEAD_BYTES_MAX // 100 + 2)]
    found, broken = read(application(), *pieces)
    assert ([name for _, name, _, _ in found], broken) == (["HeadTooLarge"], True)


def test_all_bodies_together_are_bounded_and_what_is_left_is_given_back() -> None:
    shared = Application(BodyLimits(body_bytes_max=100_000, bodies_bytes_max=150_000))
    shared.add("POST", "/echo/{name}", Echo())
    readers = [Reader(shared) for _ in range(3)]
    start = b"POST /echo/a HTTP/1.1\r\nContent-Length: 90000\r\n\r\n" + b"x" * 60_000
    for reader in readers:
        reader.feed(bytearray(start), len(start))
    refused = [json.loads(document(str(one.error)).body) for reader in readers for one in reader.complete]
    assert refused == ["too many large requests at once (try again a little later)"]
    for reader in readers:
        reader.close()
    assert shared.bodies._held == 0


def test_what_stands_before_a_blank_line_is_remembered_only_if_it_is_a_whole_head() -> None:
    """Else bytes of one caller could be taken for the body of a request that nobody has sent."""
    body = b"b" * 64
    post = b"POST /echo/a HTTP/1.1\r\nContent-Length: 64\r\n\r\n" + body
    start = b"GET / HTTP/1.1\r\nX: "
    get = start + b"y" * (len(body) - len(start) - 4) + b"\r\n\r\n"
    shared = application()
    for _ in range(2):
        assert read(shared, b"\r\n\r\n" + post)[0] == [("POST", "a", body, True)]
        assert read(shared, b"\r\n\r\n" + get)[0] == [("GET", "", b"", True)]


def test_a_head_whose_request_ended_the_connection_or_was_packed_is_not_remembered() -> None:
    shared = application()
    closing = b"POST /echo/a HTTP/1.1\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx"
    packed = b"POST /echo/a HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx"
    for _ in range(2):
        assert read(shared, closing)[0] == [("POST", "a", b"x", False)]
        assert read(shared, packed)[0][0][1] == "InvalidInput"


def test_heads_that_are_remembered_are_bounded() -> None:
    shared = application()
    for number in range(2 * HEADS_MAX + 3):
        read(shared, b"GET / HTTP/1.1\r\nX: %d\r\n\r\n" % number)
    assert 0 < len(shared.heads._known) <= HEADS_MAX
