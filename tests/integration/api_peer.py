"""The real HTTP API on a free port, over a real SQLite store and a real registry, for tests to speak to.

There is no broker: whom it would let in is remembered in `admitted`, and orders stay unpublished in the store.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from common.artifact import digest_of
from common.clock import SystemClock
from common.errors import Unavailable
from common.ids import DeviceId, Digest
from common.trust import Signer
from common.wire import Capabilities, JoinString
from controller.api import ApiSettings, Dependencies, build_api, new_token
from controller.reconciler import Reconciler
from controller.registry.blobs import LocalBlobs
from controller.registry.patches import PatchBuilder
from controller.registry.releases import Releases
from controller.resources import Join, Joined
from controller.store import open_store
from controller.store.port import Order, Store
from tests.integration.patch_bench import PLENTY
from tests.small_models import model_bytes

BLOB_BYTES_MAX = 4 * 1024 * 1024
CAPABILITIES = Capabilities(agent_version="0", machine="x86_64", cpu_count=4)


@dataclass
class ApiPeer:
    """A running API, and an operator's session with it."""

    url: str
    token: str
    store: Store
    blobs: LocalBlobs
    folder: Path
    session: aiohttp.ClientSession
    reconciler: Reconciler
    admitted: list[tuple[DeviceId, str]] = field(default_factory=list)

    async def ask(self, method: str, path: str, **options: Any) -> "Reply":
        """Send a request as the operator, or as the owner of `token`."""
        token = options.pop("token", self.token)
        headers = {**({"Authorization": f"Bearer {token}"} if token else {}), **options.pop("headers", {})}
        async with self.session.request(method, self.url + path, headers=headers, **options) as response:
            return Reply(response.status, response.headers, await response.read())

    async def upload(self, data: bytes) -> Digest:
        """Put a blob there."""
        digest = digest_of(data)
        reply = await self.ask("PUT", f"/v1/blobs/{digest}", data=data)
        assert reply.status in {200, 201}, reply.body
        return digest

    async def publish(self, model: str, version: str, data: bytes) -> "Reply":
        """Upload and publish."""
        digest = await self.upload(data)
        release = {"model": model, "version": version, "variants": {"default": {"model.onnx": digest}}}
        return await self.ask("POST", "/v1/releases", json=release)

    async def claim(self, **options: Any) -> str:
        """The token inside a fresh join string."""
        reply = await self.ask("POST", "/v1/join-tokens", json=options)
        assert reply.status == 201, reply.body
        return JoinString.parse(reply.json()["join_string"]).token

    async def join(self, name: str, **labels: str) -> Joined:
        """A new device."""
        body = msgspec.json.encode(Join(name=name, labels=labels, capabilities=CAPABILITIES))
        reply = await self.ask("POST", "/v1/join", data=body, token=await self.claim())
        assert reply.status == 201, reply.body
        return msgspec.json.decode(reply.body, type=Joined)


@dataclass(frozen=True)
class Reply:
    """An answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as plain values."""
        return msgspec.json.decode(self.body)

    def problem(self) -> dict[str, Any]:
        """The problem document; fails if it is none."""
        assert self.headers["Content-Type"] == "application/problem+json", self.body
        found: dict[str, Any] = self.json()
        assert found["status"] == self.status
        return found


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[ApiPeer]:
    """An API over an empty store in `folder`."""
    clock = SystemClock()
    store = await open_store(f"sqlite:///{folder}/ferry.db", clock)
    (folder / "blobs").mkdir()
    blobs = LocalBlobs(folder / "blobs")
    signer = Signer.generate()
    text, token = new_token("admin", "tester", clock.now())
    await store.write(lambda tx: tx.tokens.put(token))
    reconciler = Reconciler(store, _no_broker, signer, clock)
    admitted: list[tuple[DeviceId, str]] = []

    async def admit(device: DeviceId, password: str) -> None:
        admitted.append((device, password))

    deps = Dependencies(
        store=store,
        blobs=blobs,
        releases=Releases(store, blobs, signer, clock),
        patches=PatchBuilder(store, blobs, clock, PLENTY),
        reconciler=reconciler,
        admit=admit,
        signer=signer,
        clock=clock,
        settings=ApiSettings(
            public_url="http://127.0.0.1:1",
            broker_url="mqtt://127.0.0.1:2",
            blob_bytes_max=BLOB_BYTES_MAX,
            event_poll_s=0.02,
        ),
    )
    runner = web.AppRunner(build_api(deps), shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession() as session:
            url = f"http://{host}:{port}"
            yield ApiPeer(url, text, store, blobs, folder, session, reconciler, admitted)
    finally:
        await runner.cleanup()
        await store.close()


@contextlib.contextmanager
def serving_in_thread(folder: Path) -> Iterator[tuple[ApiPeer, asyncio.AbstractEventLoop]]:
    """The same for synchronous clients; `asyncio.run_coroutine_threadsafe` on the loop speaks to the peer."""
    ready = threading.Event()
    found: list[tuple[ApiPeer, asyncio.AbstractEventLoop]] = []
    over = asyncio.Event()

    async def serve() -> None:
        async with serving(folder) as peer:
            found.append((peer, asyncio.get_running_loop()))
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="api")
    thread.start()
    assert ready.wait(30), "the API did not start"
    try:
        yield found[0]
    finally:
        found[0][1].call_soon_threadsafe(over.set)
        thread.join(30)


def tiny_model(number: int = 1) -> bytes:
    """An ONNX file; different numbers give different bytes."""
    return model_bytes(ir_version=7 + number)


async def _no_broker(order: Order) -> None:
    raise Unavailable(f"no broker for order {order.generation}")
