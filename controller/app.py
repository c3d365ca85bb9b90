"""The controller put together: which parts there are, what each is given, in what order they start and stop.

This is the only place that knows all parts. They start from the ground up (folder, store, broker, loops, API) and stop
the other way round; a start that fails half-way stops what had started. Nothing here decides anything about fleets.
"""

import contextlib
import errno
import logging
import os
import secrets
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

from common import durable
from common.clock import Clock, SystemClock
from common.errors import Conflict, FerryError, InvalidInput, Unavailable
from common.observability import otlp_endpoint
from common.settings import parse_address
from common.trust import Signer
from common.wire import Kind, Topic
from controller.api.application import build_api
from controller.api.dependencies import ApiSettings, Dependencies
from controller.background import Background
from controller.broker.admission import Admission, ManagedElsewhere
from controller.broker.chunks import ChunkServer
from controller.broker.embedded import EmbeddedBroker
from controller.broker.endpoint import BrokerEndpoint
from controller.broker.link import BrokerLink
from controller.broker.mosquitto import MosquittoFiles
from controller.broker.ports import kept_port
from controller.broker.receiver import Receiver
from controller.config import ANY_HOST, Settings
from controller.housekeeping import Fleet, Forgetting, Republisher
from controller.identity import claimed_folder, ensure_admin_token, load_signer
from controller.metrics import Metrics, timing_requests
from controller.reconciler import Reconciler
from controller.registry.blobs import LocalBlobs
from controller.registry.patch_budget import Budget
from controller.registry.patches import PatchBuilder
from controller.registry.releases import Releases
from controller.store.port import Order, Store
from controller.store.sql import open_store

HTTP_STOP_TIMEOUT_S = 5.0
"""How long requests under way may take at the end."""

_log = logging.getLogger(__name__)


class Controller:
    """One controller: `start`, then it serves until `stop`."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self._stack = contextlib.AsyncExitStack()
        self._background = Background()
        self._link: BrokerLink | None = None
        self.url = ""
        """Where this machine reaches the API."""
        self.broker_url = ""
        """Where devices reach the broker."""
        self.admin_token_file = Path()

    async def start(self) -> None:
        """Start all parts; returns once requests are answered.

        Raises `FerryError` that names the cause and the fix, with everything stopped again. An external broker that is
        away is no reason to fail: the API serves, and devices poll.
        """
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self) -> None:
        """Stop all parts, last first; what was promised to anyone is on the disk."""
        await self._stack.aclose()
        _log.info("stopped")

    async def _start(self) -> None:
        settings = self._settings
        folder = self._stack.enter_context(claimed_folder(Path(settings.data)))
        metrics = Metrics(str(folder), otlp_endpoint(settings.otlp_endpoint))
        self._stack.callback(metrics.close)
        store = await open_store(settings.database or f"sqlite:///{folder / 'controller.db'}", self._clock)
        self._stack.push_async_callback(store.close)
        signer = await load_signer(folder, store)
        self.admin_token_file = await ensure_admin_token(folder, store, self._clock.now())
        blobs = LocalBlobs(_made(folder / "blobs"))
        patches = PatchBuilder(store, blobs, self._clock, _patch_budget(settings))
        reconciler = self._reconciler(store, signer, patches, metrics)
        admission = await self._start_broker(folder, store, blobs, reconciler, metrics)
        self._start_loops(store, patches, reconciler, metrics)

        host, port = parse_address(settings.listen, "listen")
        port = port or kept_port(folder / "port", host, "listen")
        self.url = _reachable(host, port)
        dependencies = Dependencies(
            store=store,
            blobs=blobs,
            releases=Releases(store, blobs, signer, self._clock),
            patches=patches,
            reconciler=reconciler,
            admit=admission.admit,
            signer=signer,
            clock=self._clock,
            settings=self._api_settings(self.url),
            health=self._health,
            metrics=metrics.text,
        )
        await self._serve(dependencies, host, port, metrics)
        _log.info("serving", extra={"url": self.url, "broker": self.broker_url, "data": str(folder)})

    def _reconciler(self, store: Store, signer: Signer, patches: PatchBuilder, metrics: Metrics) -> Reconciler:
        orders = metrics.meter.create_counter("ferry.orders.published", description="Orders that the broker took")

        async def publish(order: Order) -> None:
            await self._publish(Topic(order.device, Kind.DESIRED), order.envelope)
            orders.add(1)

        reconciler = Reconciler(
            store, publish, signer, self._clock, self._settings.reconcile_s, patches_requested=patches.nudge
        )
        reconciler.hears(False)
        return reconciler

    async def _publish(self, topic: Topic, payload: bytes) -> None:
        if self._link is None:
            raise Unavailable("not connected to the broker yet")
        await self._link.publish(topic, payload)

    # The broker

    async def _start_broker(
        self, folder: Path, store: Store, blobs: LocalBlobs, reconciler: Reconciler, metrics: Metrics
    ) -> Admission:
        """Start the embedded broker or take the external one, and the link to it."""
        broker = await (self._external(folder) if self._settings.broker else self._embedded(folder))
        self.broker_url = self._settings.device_broker or broker.url
        republisher = Republisher(store, lambda order: self._publish(Topic(order.device, Kind.DESIRED), order.envelope))
        republisher.request()
        chunks = ChunkServer(blobs, self._publish, meter=metrics.meter)
        self._stack.push_async_callback(chunks.stop)

        def up(new_session: bool) -> None:
            reconciler.hears(True)
            if new_session:
                republisher.request()

        self._link = BrokerLink(
            broker.url,
            broker.username,
            broker.password,
            broker.client_id,
            Receiver(store, self._clock, chunks, reconciler.nudge).take,
            on_up=up,
            on_down=lambda: reconciler.hears(False),
            meter=metrics.meter,
        )
        await self._link.start()
        self._stack.push_async_callback(self._link.stop)
        self._background.keep_running("republisher", republisher.run)
        return broker.admission

    async def _embedded(self, folder: Path) -> "_Broker":
        host, port = parse_address(self._settings.broker_listen, "broker_listen")
        broker = EmbeddedBroker(folder / "broker", host, port)
        await broker.start()
        self._stack.push_async_callback(broker.stop)
        return _Broker(broker, broker.url, *broker.credentials, broker.client_id)

    async def _external(self, folder: Path) -> "_Broker":
        endpoint = BrokerEndpoint.parse(self._settings.broker)
        admission: Admission = ManagedElsewhere()
        if self._settings.mosquitto_files:
            admission = MosquittoFiles(Path(self._settings.mosquitto_files), endpoint.username, endpoint.password)
            await admission.start()
        client_id = _kept_secret(folder / "mqtt-client-id")
        return _Broker(admission, endpoint.url, endpoint.username, endpoint.password, client_id)

    # The loops and the API

    def _start_loops(self, store: Store, patches: PatchBuilder, reconciler: Reconciler, metrics: Metrics) -> None:
        settings = self._settings
        kept = {"events_kept_s": settings.events_kept_s, "telemetry_kept_s": settings.telemetry_kept_s}
        self._background.keep_running("patches", patches.run)
        self._background.keep_running("reconciler", reconciler.run)
        self._background.keep_running("fleet", Fleet(store, self._clock, metrics.set_fleet).run)
        self._background.keep_running("forgetting", Forgetting(store, self._clock, **kept).run)
        self._stack.push_async_callback(self._background.stop)

    def _api_settings(self, url: str) -> ApiSettings:
        return ApiSettings(
            public_url=self._settings.public_url or url,
            broker_url=self.broker_url,
            heartbeat_s=self._settings.heartbeat_s,
            poll_s=self._settings.poll_s,
            blob_bytes_max=self._settings.blob_bytes_max,
        )

    def _health(self) -> dict[str, str]:
        connected = self._link is not None and self._link.connected
        return {"broker": "ok" if connected else "not connected; devices poll over HTTP", **self._background.health()}

    async def _serve(self, dependencies: Dependencies, host: str, port: int, metrics: Metrics) -> None:
        app = build_api(dependencies)
        app.middlewares.insert(0, timing_requests(metrics.meter))
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=HTTP_STOP_TIMEOUT_S)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        try:
            await web.TCPSite(runner, host or None, port).start()
        except OSError as error:
            raise _cannot_listen(host, port, error) from error


class _Broker(NamedTuple):
    """The broker in use: how the controller logs in, and who lets devices in."""

    admission: Admission
    url: str
    username: str
    password: str
    client_id: str


def _patch_budget(settings: Settings) -> Budget:
    return Budget(
        workers=settings.patch_workers or max(1, (os.cpu_count() or 1) - 1),
        cpu_s_per_release=settings.patch_cpu_s_per_release,
        build_cpu_s_max=settings.patch_build_cpu_s_max,
        disk_bytes_max=settings.patch_disk_bytes_max,
    )


def _cannot_listen(host: str, port: int, error: OSError) -> FerryError:
    if error.errno == errno.EADDRINUSE:
        fix = "stop what listens there, or choose another with --listen HOST:PORT"
        return Conflict(f"the API's port {host}:{port} is already in use", field="listen", fix=fix)
    fix = "give an address of this machine and a port, for example 127.0.0.1:8480"
    return InvalidInput(f"cannot listen on {host}:{port}: {error.strerror}", field="listen", fix=fix)


def _kept_secret(path: Path) -> str:
    """An unguessable word, made once and kept in the file at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    secret = f"ferry-{secrets.token_hex(16)}"
    durable.write_file(path, secret.encode(), durable.PRIVATE_MODE)
    return secret


def _reachable(host: str, port: int) -> str:
    """The URL by which this machine reaches a server that listens on `host:port`."""
    name = "127.0.0.1" if host in ANY_HOST else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
