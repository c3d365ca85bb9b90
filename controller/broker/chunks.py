"""Small artifacts over MQTT: a device asks for each chunk on `rq` and gets it on `dl`.

The device sets the pace, so a slow one costs nothing; what this side bounds is how much is read and sent at the same
time, for each device and for all. What is beyond a bound is dropped and counted, not queued: the device asks again,
as it does after any loss. A chunk that cannot be given is answered with an error code, so that the device can turn to
HTTP at once. Any known device may read any blob, here as over HTTP: blobs are named by their digests, which are not
secret, and orders are what a device trusts.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

from msgspec.structs import replace
from opentelemetry.metrics import Meter, NoOpMeter

from common.errors import FerryError, InvalidInput, NotFound, Unavailable
from common.ids import DeviceId
from common.wire import Chunk, ChunkRequest, Kind, Topic, decode, encode
from controller.registry.blobs import LocalBlobs

REQUESTS_PER_DEVICE_MAX = 16
"""Four times the window that an agent uses."""
REQUESTS_MAX = 256
"""For all devices: 32 MiB of chunks in memory."""

_log = logging.getLogger(__name__)


class ChunkServer:
    """Answers chunk requests from the blobs. `publish` is the link's."""

    def __init__(
        self,
        blobs: LocalBlobs,
        publish: Callable[[Topic, bytes], Awaitable[None]],
        *,
        per_device_max: int = REQUESTS_PER_DEVICE_MAX,
        total_max: int = REQUESTS_MAX,
        meter: Meter | None = None,
    ) -> None:
        meter = meter or NoOpMeter("broker")
        self._blobs = blobs
        self._publish = publish
        self._per_device_max = per_device_max
        self._total_max = total_max
        self._busy: Counter[DeviceId] = Counter()
        self._answers: set[asyncio.Task[None]] = set()
        self._sent = meter.create_counter("ferry.chunks.sent", description="Chunks sent to devices")
        self._bytes = meter.create_counter("ferry.chunks.size", unit="By", description="Bytes of artifacts in chunks")
        self._dropped = meter.create_counter("ferry.chunks.dropped", description="Chunk requests beyond a limit")

    def take(self, device: DeviceId, payload: bytes) -> None:
        """Begin to answer a request that came from `device`, and return at once. Raises `InvalidInput`."""
        request = decode(payload, ChunkRequest)
        if request.device != device:
            raise InvalidInput(f"{device} asked in the name of {request.device[:80]!r}", field="device")
        if self._busy[device] >= self._per_device_max or len(self._answers) >= self._total_max:
            self._dropped.add(1)
            return
        self._busy[device] += 1
        answer = asyncio.create_task(self._serve(device, request), name=f"chunk-{device}")
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)

    async def stop(self) -> None:
        """Drop the answers under way."""
        for answer in list(self._answers):
            answer.cancel()
        await asyncio.gather(*self._answers, return_exceptions=True)

    async def _serve(self, device: DeviceId, request: ChunkRequest) -> None:
        try:
            chunk = await asyncio.to_thread(self._chunk, device, request)
            await self._publish(Topic(device, Kind.CHUNK), encode(chunk))
            self._sent.add(1)
            self._bytes.add(len(chunk.data))
        except Unavailable as error:
            _log.info("dropped a chunk: %s", error, extra={"device": device})
        finally:
            self._busy[device] -= 1
            if not self._busy[device]:
                del self._busy[device]

    def _chunk(self, device: DeviceId, request: ChunkRequest) -> Chunk:
        chunk = Chunk(device=device, digest=request.digest, offset=request.offset, total=0)
        try:
            artifact = self._blobs.find(request.digest)
            if artifact is None:
                raise NotFound(f"no blob {request.digest}", field="digest")
            if request.offset >= max(artifact.size, 1):
                raise InvalidInput(f"the blob has {artifact.size} bytes", field="offset")
            data = self._blobs.read(request.digest, request.offset, request.length)
        except FerryError as error:
            return replace(chunk, error=error.code)
        return replace(chunk, total=artifact.size, data=data)
