"""A small controller for the agent's tests: it signs orders and manifests and serves blobs over real HTTP, with faults.

`faults` maps a digest to what is wrong with it: `tamper` flips a byte, `truncate` sends half and closes, `stall` sends
half and no more, `missing` is 404; `break_once` sends half of the first answer and closes, `tamper_once` flips a byte
of it. While `offline` is true, every line to a blob breaks. `sent` counts the bytes that left for each digest. The
device's twin is here too: polls get the newest order, reports are kept in `reports`. `misbehave` answers everything
instead, as long as it is set.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from common import delta
from common.artifact import ArtifactRef, ReleaseManifest, Variant, digest_of, encode_manifest
from common.artifact.manifest import PAYLOAD_TYPE
from common.artifact.onnx_io import read_signature
from common.artifact.parts import cut, encode_index, index_of, missing_bytes
from common.artifact.protobuf import Span
from common.artifact.selftest import SelfTest
from common.artifact.serving import ServingTerms
from common.artifact.source import BytesSource
from common.ids import DeviceId, Digest, ModelName, Version
from common.trust import PublicKey, Signer
from common.wire import (
    DesiredFile,
    DesiredModel,
    DesiredState,
    PartsOffer,
    PatchOffer,
    ReportedState,
    decode,
    encode,
)
from common.wire.messages import DESIRED_PAYLOAD_TYPE

DEVICE = DeviceId("dev-1")
MODEL = ModelName("kinds")
ONNX_FILE = "model.onnx"

Misbehaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ReleaseDesk:
    """Publishes releases of one model and writes orders for one device."""

    def __init__(self) -> None:
        self.signer = Signer.generate()
        self.blobs: dict[Digest, bytes] = {}
        self.faults: dict[Digest, str] = {}
        self.sent: Counter[Digest] = Counter()
        self.asked: Counter[Digest] = Counter()
        self.offline = False
        self.generation = 0
        self.url = ""
        self.newest = b""
        self.polls = 0
        self.not_modified = 0
        self.reports: list[ReportedState] = []
        self.misbehave: Misbehaviour | None = None
        self.requests = 0
        self._runner: web.AppRunner | None = None

    @property
    def keys(self) -> tuple[PublicKey, ...]:
        return (self.signer.public_key,)

    async def start(self) -> None:
        application = web.Application(middlewares=[self._answer])
        application.router.add_get("/v1/blobs/{digest}", self._blob)
        application.router.add_get("/v1/devices/{device}/desired", self._desired)
        application.router.add_put("/v1/devices/{device}/reported", self._reported)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()

    def put(self, data: bytes) -> ArtifactRef:
        ref = ArtifactRef(digest_of(data), len(data))
        self.blobs[ref.digest] = data
        return ref

    def release(
        self,
        version: str,
        data: bytes,
        *,
        manifest_of: bytes | None = None,
        patches: Iterable[PatchOffer] = (),
        parts: Iterable[PartsOffer] = (),
        weights: Mapping[str, bytes] | None = None,
        self_test: SelfTest | None = None,
        dress: Callable[[Variant], Variant] = lambda variant: variant,
        serving: ServingTerms | None = None,
        **changes: Any,
    ) -> DesiredModel:
        """The order for `data`, with `weights` beside it, as `version`. The offers are made for each file.

        `manifest_of` lets the manifest speak of other bytes. The samples of `self_test` are among `weights`; `dress`
        puts on what else the variant has.
        """
        refs = {name: self.put(content) for name, content in {ONNX_FILE: data, **(weights or {})}.items()}
        signature = read_signature(BytesSource(data))
        promised = refs | ({ONNX_FILE: self.put(manifest_of)} if manifest_of else {})
        variant = Variant(promised, ONNX_FILE, signature.inputs, signature.outputs, self_test, serving=serving)
        variant = dress(variant)
        manifest = ReleaseManifest(MODEL, Version(version), {"default": variant})
        envelope = self.put(self.signer.sign(PAYLOAD_TYPE, encode_manifest(manifest)))
        fields: dict[str, Any] = {"order": self.generation + 1, "probation_s": 0.3} | changes
        files = tuple(
            DesiredFile(name=name, artifact=ref, patches=tuple(patches), parts=tuple(parts))
            for name, ref in refs.items()
        )
        return DesiredModel(
            model=MODEL, version=Version(version), variant="default", manifest=envelope, files=files, **fields
        )

    def patch(self, base: bytes, target: bytes, codec: str = delta.CODECS[0]) -> PatchOffer:
        """A real patch, published."""
        pieces: list[bytes] = []
        delta.make(BytesSource(base), BytesSource(target), pieces.append, codec=codec)
        target_ref = ArtifactRef(digest_of(target), len(target))
        return PatchOffer(digest_of(base), target_ref, self.put(b"".join(pieces)), codec)

    def parts(self, base: bytes, target: bytes, tensors: Iterable[Span] = ()) -> PartsOffer:
        """The indexes of both, published, cut at `tensors` and in pieces."""
        held, wanted = (index_of(BytesSource(data), cut(tensors, len(data))) for data in (base, target))
        refs = [self.put(encode_index(index)) for index in (held, wanted)]
        return PartsOffer(digest_of(base), refs[0], refs[1], missing_bytes([held], wanted))

    def order(
        self,
        *models: DesiredModel,
        device: DeviceId = DEVICE,
        generation: int | None = None,
        traceparent: str | None = None,
    ) -> bytes:
        """The next signed order; it is also what a poll gets."""
        if generation is None:
            self.generation += 1
        desired = DesiredState(
            device=device,
            generation=generation or self.generation,
            issued_at=1.0,
            models=models,
            traceparent=traceparent,
        )
        self.newest = self.signer.sign(DESIRED_PAYLOAD_TYPE, encode(desired))
        return self.newest

    @web.middleware
    async def _answer(self, request: web.Request, handler: Misbehaviour) -> web.StreamResponse:
        self.requests += 1
        return await (self.misbehave or handler)(request)

    async def _desired(self, request: web.Request) -> web.Response:
        self.polls += 1
        etag = f'"{digest_of(self.newest)}"'
        if request.headers.get("If-None-Match") == etag:
            self.not_modified += 1
            return web.Response(status=304, headers={"ETag": etag})
        return web.Response(body=self.newest, headers={"ETag": etag})

    async def _reported(self, request: web.Request) -> web.Response:
        self.reports.append(decode(await request.read(), ReportedState))
        return web.Response(status=204)

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        digest = Digest(request.match_info["digest"])
        if self.offline and request.transport:
            request.transport.close()
        self.asked[digest] += 1
        fault = self.faults.get(digest, "")
        if fault == "missing" or digest not in self.blobs:
            raise web.HTTPNotFound
        data = self.blobs[digest]
        if fault in {"tamper", "tamper_once"}:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = request.http_range
        body = data[asked]
        headers = {"ETag": f'"{digest}"', "Content-Length": str(len(body))}
        ranged = "Range" in request.headers
        if ranged:
            start = asked.start or 0
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
        response = web.StreamResponse(status=206 if ranged else 200, headers=headers)
        await response.prepare(request)
        if fault in {"truncate", "break_once", "stall"}:
            body = body[: len(body) // 2]
        if fault.endswith("_once"):
            del self.faults[digest]
        self.sent[digest] += len(body)
        await response.write(body)
        if fault == "stall":
            await asyncio.Event().wait()
        if len(body) < int(headers["Content-Length"]) and request.transport:
            request.transport.close()
        return response


def recalibrated(path: Path) -> bytes:
    """The real model with another final bias: a small true change."""
    return _edited(path, "Dense_1/Reshape:0", lambda values: values + 0.25)


def fails_on(path: Path, token: int) -> bytes:
    """The real model made to answer NaN for inputs that hold `token`: its embedding row overflows."""

    def overflow(values: Any) -> Any:
        values[token] = 3e38
        return values

    return _edited(path, "get_logits_/Const:0", overflow)


def _edited(path: Path, name_end: str, edit: Any) -> bytes:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(name_end) and tensor.data_type == onnx.TensorProto.FLOAT:
            values = edit(numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            data: bytes = model.SerializeToString()
            return data
    raise AssertionError(f"the model has no {name_end}")
