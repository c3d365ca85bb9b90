"""What happens, as it happens: server-sent events (WHATWG HTML, section 9.2) over the store's outbox.

`id:` is the outbox sequence number, so that a client that comes back with Last-Event-ID misses nothing. Nobody has a
queue here: while somebody watches, one loop asks the store how far it has come, and each client reads on from where it
is when there is more. So a slow client costs itself time and nobody memory.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator

import msgspec
from aiohttp import web

from common.errors import InvalidInput, Unavailable
from controller.api.dependencies import Dependencies
from controller.api.route import Call, route
from controller.resources import EventQuery
from controller.store.port import Event, Journal

logger = logging.getLogger(__name__)

EVENTS_PER_READ = 500
RETRY_MS = 2000
SEQ_DIGITS_MAX = 18
EVENT_STREAM = "text/event-stream"


@route("GET", "/v1/events", summary="Watch what happens, as server-sent events", produces=EVENT_STREAM)
async def watch(call: Call, query: EventQuery) -> web.StreamResponse:
    """Events after Last-Event-ID or `after`, or from now on, until the client or the controller goes away."""
    feed = call.request.app[FEED]
    seen = _last_seen(call.request, query)
    seq = await feed.newest() if seen is None else seen
    response = web.StreamResponse(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
    response.content_type = EVENT_STREAM
    await call.stream(response)
    await response.write(f"retry: {RETRY_MS}\n\n".encode())
    while not feed.closed:
        events = await feed.after(seq, call.deps.settings.sse_keepalive_s)
        frames = b"".join(_frame(event) for event in events if _wanted(event, query))
        await response.write(frames or b": still here\n\n")
        seq = events[-1].seq if events else seq
    return response


class EventFeed:
    """Tells those who watch when the outbox has grown."""

    def __init__(self, deps: Dependencies) -> None:
        self._store = deps.store
        self._poll_s = deps.settings.event_poll_s
        self._newest = 0
        self._watchers = 0
        self._watched = asyncio.Event()
        self._grown = asyncio.Condition()
        self.closed = False

    async def newest(self) -> int:
        """The sequence number of the last event there is."""
        known = self._newest
        return await self._store.read(lambda tx: newest_seq(tx.journal, known))

    async def after(self, seq: int, timeout_s: float) -> list[Event]:
        """Some events after `seq`, oldest first: at once if there are any, else when one comes; none at the timeout."""
        with self._watching():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s), self._grown:
                    await self._grown.wait_for(lambda: self._newest > seq or self.closed)
            if self._newest <= seq:
                return []
            return await self._store.read(lambda tx: tx.journal.events_after(seq, EVENTS_PER_READ))

    async def run(self) -> None:
        """Look for new events while somebody waits for one."""
        while True:
            await self._watched.wait()
            try:
                newest = await self.newest()
            except Unavailable as error:
                logger.warning("cannot read events", extra={"reason": str(error)})
            else:
                if newest > self._newest:
                    self._newest = newest
                    await self._tell()
            await asyncio.sleep(self._poll_s)

    async def close(self) -> None:
        """Let everybody who waits go."""
        self.closed = True
        await self._tell()

    async def _tell(self) -> None:
        async with self._grown:
            self._grown.notify_all()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        self._watchers += 1
        self._watched.set()
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._watched.clear()


FEED = web.AppKey("feed", EventFeed)


async def feeding(app: web.Application) -> AsyncIterator[None]:
    """An aiohttp cleanup context: the feed runs while the application does."""
    running = asyncio.create_task(app[FEED].run())
    yield
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def closing(app: web.Application) -> None:
    """On shutdown, before connections are closed: end the streams."""
    await app[FEED].close()


def newest_seq(journal: Journal, known: int = 0) -> int:
    """The newest sequence number, at least `known`: by doubling, then halving, because numbers may have gaps."""
    if not journal.events_after(known, 1):
        return known
    step = 1
    while journal.events_after(known + step, 1):
        step *= 2
    low, high = known + step // 2, known + step
    while low < high:
        middle = (low + high) // 2
        if journal.events_after(middle, 1):
            low = middle + 1
        else:
            high = middle
    return low


def _last_seen(request: web.Request, query: EventQuery) -> int | None:
    header = request.headers.get("Last-Event-ID")
    if header is None:
        return query.after
    if not header.isascii() or not header.isdigit() or len(header) > SEQ_DIGITS_MAX:
        raise InvalidInput("is not an event number", field="Last-Event-ID", fix="send the last `id:` you received")
    return int(header)


def _wanted(event: Event, query: EventQuery) -> bool:
    kind_fits = not query.kind or event.kind == query.kind or event.kind.startswith(f"{query.kind}.")
    return kind_fits and (not query.subject or event.subject == query.subject)


def _frame(event: Event) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, event.kind.encode(), msgspec.json.encode(event))
