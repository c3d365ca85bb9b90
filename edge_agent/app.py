"""The agent put together: the only place that knows all of its parts.

The order of the start is the point. First the journal and the slots, then what is installed is served and the inference
API listens, and only then the network is tried: a device without one answers just the same.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from common.clock import Clock, SystemClock
from common.errors import Conflict
from common.ids import ModelName
from common.observability import otlp_endpoint
from common.settings import parse_address
from edge_agent.broker import AgentLink
from edge_agent.config import AgentSettings, ModelSettings
from edge_agent.conversation import Conversation, Rhythm
from edge_agent.executor import ColdStart, Executor, Pacing, Parts, Standing, UpdateLimits
from edge_agent.fetch import DesiredPoll, make_fetcher, open_session
from edge_agent.fetch.session import tls_context
from edge_agent.identity import Identity
from edge_agent.inference.http import inference_app
from edge_agent.inference.labels import Labels
from edge_agent.inference.listening import listen
from edge_agent.inference.live import LiveModels
from edge_agent.inference.memory import Memory
from edge_agent.inference.optimised import OptimisedModels
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.probing import ProbingEngine
from edge_agent.inference.provider_memory import FILE_NAME as PROVIDERS_FILE
from edge_agent.inference.provider_memory import ProviderMemory
from edge_agent.inference.serving import ModelServer
from edge_agent.journal import FILE_NAME, Journal
from edge_agent.machine import boot_number, capabilities, device_class
from edge_agent.meminfo import available_bytes, used_bytes
from edge_agent.slots import Slots, free_bytes
from edge_agent.telemetry.recorder import Recorder
from edge_agent.telemetry.spool import FILE_NAME as SPOOL_FILE
from edge_agent.telemetry.spool import Spool
from edge_agent.telemetry.usage import Findings, UsageMeter
from edge_agent.update.pace import PaceLimits
from edge_agent.vitals import CpuLoad, Vitals
from edge_agent.watchdog import Pulse, Watched

if TYPE_CHECKING:
    from edge_agent.telemetry.metrics import ExportingRecorder

EPOCH = "epoch"
"""The journal's name for the number of connections."""

INFERENCE_STALL_S = 300.0
"""No inference thread has finished anything for so long: hung. One request to a very large model may take minutes."""
JOURNAL_STALL_S = 1800.0
"""The journal has not been read for so long: hung. Its thread may have to wait for building files and a slow disk."""


class Agent:
    """One device's agent. `start` returns when it serves; `stop` leaves everything ready for the next start."""

    def __init__(self, settings: AgentSettings, identity: Identity, clock: Clock | None = None) -> None:
        self._settings = settings
        self._identity = identity
        self._clock = clock or SystemClock()
        self._chance = random.Random()  # noqa: S311 (jitter, no secret)
        self._running = contextlib.AsyncExitStack()
        self._conversation: Conversation | None = None
        self._standing: Callable[[], Standing] | None = None
        self._watched: Watched | None = None
        self._connected = False
        self._server: ModelServer | None = None
        self._labels: Labels | None = None
        self.inference_url = ""

    async def start(self) -> None:
        """Serve what is installed, listen, then connect. On failure everything that was started is stopped again."""
        async with contextlib.AsyncExitStack() as running:
            await self._start(running)
            self._running = running.pop_all()

    async def stop(self) -> None:
        """Stop everything, last started first: requests under way are answered, the journal is closed last."""
        await self._running.aclose()

    @property
    def server(self) -> ModelServer:
        """What answers requests; only after `start`."""
        if self._server is None:
            raise Conflict("the agent has not started")
        return self._server

    @property
    def labels(self) -> Labels:
        """What answers can be labelled; only after `start`."""
        if self._labels is None:
            raise Conflict("the agent has not started")
        return self._labels

    def status(self) -> dict[str, Any]:
        """What `GET /status` on the inference API tells."""
        standing: dict[str, Any] = msgspec.to_builtins(self._standing()) if self._standing else {}
        serving: list[Any] = msgspec.to_builtins(self._server.kept_terms()) if self._server else []
        traffic = msgspec.to_builtins(self._server.traffic()) if self._server else {}
        told = {"device": self._identity.device, "connected": self._connected}
        return {**told, **standing, "serving": serving, "traffic": traffic}

    @property
    def watched(self) -> Watched:
        """What tells that the started agent is healthy."""
        if self._watched is None:
            raise AssertionError("watched before it was started")
        return self._watched

    async def _start(self, running: contextlib.AsyncExitStack) -> None:
        settings, identity, clock = self._settings, self._identity, self._clock
        journal = Journal(settings.data / FILE_NAME)
        running.callback(journal.close)
        spool = Spool(settings.data / SPOOL_FILE, bytes_max=settings.telemetry_bytes_max)
        running.callback(spool.close)
        recorder, findings = Recorder(clock.now()), Findings()
        observed = self._observed(recorder, running)
        native = settings.custom_ops == "allow"
        providers = ProviderMemory(settings.data / PROVIDERS_FILE)
        running.callback(providers.close)
        engine = ProbingEngine(OrtEngine(custom_ops=native), settings.providers, providers)
        server = self._server = ModelServer(
            engine,
            observed,
            clock,
            run_s_max=settings.inference_s_max,
            sample_interval_s=settings.sample_interval_s,
            batch_bytes_max=settings.batch_bytes_max,
            cache_bytes_max=settings.cache_bytes_max,
            changes=settings.models,
            on_demand=lambda model: self._cold(model).mode != "resident",
        )
        labels = self._labels = Labels(observed, clock, settings.label_s_max)
        running.push_async_callback(server.close)
        session = await running.enter_async_context(open_session(identity.device_token, settings.ca_file))
        link = self._make_link(journal, device_class(engine.version, engine.setup, engine.providers))
        parts = Parts(
            journal=journal,
            slots=Slots(settings.data, reserve_bytes=settings.disk_reserve_bytes),
            fetcher=make_fetcher(identity.controller_url, session, link, settings.fetch_limits(), clock),
            server=server,
            clock=clock,
            chance=self._chance,
            keys=identity.signing_keys,
            changed=self._changed,
            limits=UpdateLimits(
                scrub_interval_s=settings.scrub_interval_s,
                scrub_bytes_per_s=settings.scrub_bytes_per_s,
                models_max=settings.models_max,
            ),
            boot=boot_number(),
            custom_ops=native,
            findings=findings,
            optimised=self._optimised(engine),
            live=LiveModels(),
            cold=self._cold,
            pacing=Pacing(server, CpuLoad().percent, clock, self._pace_limits()),
            memory=Memory(available_bytes, used_bytes, reserve_bytes=settings.memory_reserve_bytes),
        )
        executor = Executor(parts, identity.device)
        self._standing = executor.standing

        await executor.start()
        running.push_async_callback(executor.stop)
        listener = await listen(
            inference_app(server, self.status, labels=labels),
            *parse_address(settings.inference_listen, "inference_listen"),
            settings.inference_socket,
        )
        running.push_async_callback(listener.close)
        self.inference_url = listener.url
        await link.start()
        running.push_async_callback(link.stop)
        self._conversation = Conversation(
            identity.device,
            link=link,
            poll=DesiredPoll(identity.controller_url, identity.device, session),
            executor=executor,
            journal=journal,
            recorder=recorder,
            spool=spool,
            usage=UsageMeter(clock.now(), findings),
            vitals=Vitals(settings.data, clock),
            clock=clock,
            chance=self._chance,
            rhythm=self._rhythm(),
        )
        self._conversation.start()
        running.push_async_callback(self._conversation.stop)
        self._watched = self._make_watched(server, journal, (executor, link, self._conversation))

    def _optimised(self, engine: ProbingEngine) -> OptimisedModels | None:
        settings = self._settings
        if not settings.optimised_bytes_max:
            return None
        return OptimisedModels(
            settings.data / "optimised",
            engine,
            bytes_max=settings.optimised_bytes_max,
            reserve_bytes=settings.disk_reserve_bytes,
            free=free_bytes,
        )

    def _pace_limits(self) -> PaceLimits:
        settings = self._settings
        return PaceLimits(
            cpu_percent_max=settings.defer_cpu_percent,
            latency_s_max=settings.defer_latency_s,
            defer_s_max=settings.defer_s_max,
        )

    def _cold(self, model: ModelName) -> ColdStart:
        settings = self._settings
        own = settings.models.get(model, ModelSettings())
        return ColdStart(mode=own.cold_start or settings.cold_start, idle_s=own.idle_s or settings.idle_s)

    def _make_watched(
        self, server: ModelServer, journal: Journal, loops: tuple[Executor, AgentLink, Conversation]
    ) -> Watched:
        inference = Pulse("inference threads", server.pulse, lambda: server.finished, INFERENCE_STALL_S)
        reading = Pulse("journal", lambda: asyncio.to_thread(journal.number, EPOCH), lambda: 0, JOURNAL_STALL_S)
        return Watched(
            pulses=(inference, reading),
            ended=lambda: [name for part in loops for name in part.ended],
            sentence=self._sentence,
        )

    def _sentence(self) -> str:
        """How the agent is, for people."""
        running = self._standing().running if self._standing else {}
        models = ", ".join(f"{model}@{version}" for model, version in sorted(running.items()))
        line = "connected" if self._connected else "no connection to the broker"
        return f"{self._identity.device} serves {models or 'no model yet'}; {line}"

    def _observed(self, recorder: Recorder, running: contextlib.AsyncExitStack) -> "Recorder | ExportingRecorder":
        """The recorder, with an exporter in front of it if a collector is configured."""
        endpoint = otlp_endpoint(self._settings.otlp_endpoint)
        if not endpoint:
            return recorder
        from edge_agent.telemetry.metrics import ExportingRecorder  # and with it OpenTelemetry's SDK

        exporting = ExportingRecorder(recorder, self._identity.device, endpoint)
        running.push_async_callback(asyncio.to_thread, exporting.close)
        return exporting

    def _make_link(self, journal: Journal, kind: str) -> AgentLink:
        settings, identity = self._settings, self._identity
        return AgentLink(
            identity,
            on_desired=self._take_order,
            epoch_source=lambda: journal.count(EPOCH),
            capabilities=lambda: capabilities(settings, self.inference_url, kind),
            clock=self._clock,
            on_connection=self._line_changed,
            tls=tls_context(settings.ca_file) if identity.broker.url.startswith("mqtts:") else None,
            uniform=self._chance.random,
        )

    def _rhythm(self) -> Rhythm:
        settings, identity = self._settings, self._identity
        return Rhythm(
            heartbeat_s=settings.heartbeat_s or identity.heartbeat_s,
            telemetry_s=settings.telemetry_s,
            poll_s=settings.poll_s or identity.poll_s,
        )

    # Link, executor and conversation know each other; these three let each be made before the last of them is.

    async def _take_order(self, envelope: bytes) -> None:
        if self._conversation is not None:
            await self._conversation.take_order(envelope)

    def _line_changed(self, connected: bool) -> None:
        self._connected = connected
        if self._conversation is not None:
            self._conversation.line_changed(connected)

    def _changed(self) -> None:
        if self._conversation is not None:
            self._conversation.changed()
