"""From a topic and bytes to a unit of work: decodes what devices send and hands it to `controller.intake`.

`take` returns when the store has committed, which is when the link acknowledges. A message is decoded as the type
that its topic demands; `InvalidInput` says what is wrong with it. Chunk requests change nothing and are answered aside.
"""

from collections.abc import Callable
from typing import TypeVar

from opentelemetry import trace

from common.clock import Clock
from common.errors import InvalidInput
from common.ids import DeviceId
from common.observability import context_from
from common.wire import Heartbeat, Kind, Message, Presence, ReportedState, Telemetry, Topic, decode
from controller.broker.chunks import ChunkServer
from controller.intake import apply_heartbeat, apply_presence, apply_reported, apply_telemetry
from controller.store.port import Store, Transaction

M = TypeVar("M", bound=Message)

_tracer = trace.get_tracer(__name__)


class Receiver:
    """Takes messages for the link. `changed` is called after one that may give the reconciler something to do."""

    def __init__(self, store: Store, clock: Clock, chunks: ChunkServer, changed: Callable[[], object]) -> None:
        self._store = store
        self._clock = clock
        self._chunks = chunks
        self._changed = changed

    async def take(self, topic: Topic, payload: bytes) -> None:
        """Have the message stored. Raises `InvalidInput`, and what `Store.write` raises."""
        match topic.kind:
            case Kind.STATE:
                await self._apply(apply_presence, topic.device, decode(payload, Presence))
            case Kind.HEARTBEAT:
                await self._apply(apply_heartbeat, topic.device, decode(payload, Heartbeat))
            case Kind.TELEMETRY:
                await self._apply(apply_telemetry, topic.device, decode(payload, Telemetry))
            case Kind.REPORTED:
                report = decode(payload, ReportedState)
                with _tracer.start_as_current_span("report.receive", context_from(report.traceparent)) as span:
                    span.set_attribute("ferry.device", topic.device)
                    await self._apply(apply_reported, topic.device, report)
            case Kind.CHUNK_REQUEST:
                self._chunks.take(topic.device, payload)
            case Kind.DESIRED | Kind.CHUNK:
                raise InvalidInput(f"devices do not send {topic.kind.value!r}", field="topic")

    async def _apply(
        self, apply: Callable[[Transaction, DeviceId, M, float], bool], device: DeviceId, message: M
    ) -> None:
        now = self._clock.now()
        if await self._store.write(lambda tx: apply(tx, device, message, now)):
            self._changed()
