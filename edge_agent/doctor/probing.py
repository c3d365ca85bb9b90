"""Looking at a device from the outside: its disk, its network, its runtime. Nothing changes, nothing waits for ever.

Every look has a limit below, and all but the first few go on at the same time, so the whole takes no longer than the
longest. What blocks runs in daemon threads at the lowest priority: a disk that hangs must not hang the doctor too, and
a device that serves must not notice that it is being looked at.
"""

import asyncio
import contextlib
import os
import platform
import secrets
import signal
import sqlite3
import sys
import time
from collections.abc import Awaitable, Iterable
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path

import aiohttp
import msgspec
import psutil

from common.delta import CODECS
from common.errors import FerryError, Unavailable
from edge_agent.broker.connection import CONNECT_TIMEOUT_S, Connection, Endpoint, parse_broker_url
from edge_agent.config import AgentSettings
from edge_agent.doctor import judging
from edge_agent.doctor.judging import Finding
from edge_agent.fetch.problems import PROBLEM_BYTES_MAX, problem_error
from edge_agent.fetch.session import open_session, tls_context
from edge_agent.fetch.twin import unreachable
from edge_agent.identity import Identity, identity_path, load_identity
from edge_agent.inference.niced import run_niced
from edge_agent.journal import FILE_NAME as JOURNAL_FILE
from edge_agent.journal import Journal
from edge_agent.running import find_run
from edge_agent.slots import Slots, free_bytes
from edge_agent.telemetry.spool import FILE_NAME as SPOOL_FILE
from edge_agent.telemetry.spool import UNREADABLE_SUFFIX, counts
from edge_agent.update import Installed, ModelState

DISK_S = 20.0
"""For the journal and the spool, each."""
CONTROLLER_S = 15.0
BROKER_S = CONNECT_TIMEOUT_S + 5.0
AGENT_S = 5.0
RUNTIME_S = 30.0
SLOTS_S = 60.0
"""For reading every byte of every installed release."""

WORTH_NAMING = (
    "avx",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "f16c",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
"""Extensions of processors that ONNX Runtime makes use of."""


async def examine(settings: AgentSettings) -> tuple[Finding, ...]:
    """Every check that can be made here, the basic ones first."""
    first = [judging.folder(_folder(settings))]
    if first[0].verdict == "problem" and not settings.data.is_dir():
        return (*first, *await _of_the_machine((), 0))
    identity, finding = _identity(settings.data)
    first.append(finding)
    states, found = await _journal(settings.data)
    first += found
    later = [
        _of_the_machine(states, settings.memory_reserve_bytes),
        _agent(settings),
        _slots(settings, states),
        _spool(settings),
    ]
    if identity is not None:
        later += [_controller(identity, settings), _broker(identity, settings)]
    gathered = await asyncio.gather(*later)
    return (*first, *(finding for findings in gathered for finding in findings), *judging.updates(states))


def _folder(settings: AgentSettings) -> judging.Folder:
    path = settings.data
    if not path.is_dir():
        return judging.Folder(path=str(path), exists=False)
    return judging.Folder(
        path=str(path),
        exists=True,
        writable=os.access(path, os.W_OK | os.X_OK),
        free=free_bytes(path),
        reserve=settings.disk_reserve_bytes,
    )


def _identity(data: Path) -> tuple[Identity | None, Finding]:
    try:
        identity = load_identity(data)
        return identity, judging.identity(identity.device, identity_path(data).stat().st_mode & 0o777)
    except FerryError as error:
        return None, judging.problem("identity", error.message, error.fix or "")


async def _within(check: str, limit_s: float, work: Awaitable[list[Finding]]) -> list[Finding]:
    """The findings of `work`, or the finding that it takes too long."""
    try:
        async with asyncio.timeout(limit_s):
            return await work
    except TimeoutError:
        return [judging.late(check, limit_s)]


async def _journal(data: Path) -> tuple[tuple[ModelState, ...], list[Finding]]:
    """What the journal knows, and whether it is whole."""
    path = data / JOURNAL_FILE
    states: list[ModelState] = []

    def look() -> list[Finding]:
        if not path.exists():
            return []
        try:
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                (verdict,) = database.execute("pragma quick_check(1)").fetchone()
            if verdict != "ok":
                return [judging.journal(0, str(verdict))]
            with contextlib.closing(Journal(path)) as journal:
                states.extend(state for _, state in sorted(journal.load().items()))
        except (sqlite3.Error, FerryError) as error:
            return [judging.journal(0, str(error))]
        return [judging.journal(len(states), "")]

    found = await _within("journal", DISK_S, run_niced(look, "doctor-journal"))
    return tuple(states), found


async def _of_the_machine(states: Iterable[ModelState], reserve: int) -> list[Finding]:
    """Runtime, patches, memory."""
    memory = psutil.virtual_memory()
    facts = judging.Memory(
        total=memory.total,
        available=memory.available,
        reserve=reserve,
        largest_model=judging.largest_model(tuple(states)),
    )
    runtime = await _within("runtime", RUNTIME_S, _runtime())
    return [*runtime, judging.codecs(CODECS), judging.memory(facts)]


async def _runtime() -> list[Finding]:
    """One inference in a process of its own."""
    isolated = ("-I",) if sys.flags.isolated else ()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *isolated,
        "-m",
        "edge_agent.doctor.runtime",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    code = process.returncode or 0
    facts = judging.Runtime(machine=platform.machine(), flags=_cpu_flags())
    if code < 0:
        error = f"ONNX Runtime was ended by {signal.Signals(-code).name}: it is built for another processor"
        return [judging.runtime(msgspec.structs.replace(facts, error=error))]
    if code > 0:
        last = err.decode(errors="replace").strip().rpartition("\n")[2]
        return [judging.runtime(msgspec.structs.replace(facts, error=f"ONNX Runtime does not work: {last}"))]
    return [judging.runtime(msgspec.structs.replace(facts, version=out.decode()))]


def _cpu_flags() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return tuple(flag for flag in WORTH_NAMING if flag in flags)


async def _controller(identity: Identity, settings: AgentSettings) -> list[Finding]:
    """A poll for orders, as the agent sends it, and what the answer says of the time."""

    async def ask() -> list[Finding]:
        try:
            answer = await _poll(identity, settings)
        except FerryError as error:
            return [judging.controller(error)]
        return [finding for finding in (judging.controller(answer), judging.clock(answer)) if finding]

    return await _within("controller", CONTROLLER_S, ask())


async def _poll(identity: Identity, settings: AgentSettings) -> judging.Answer:
    url = f"{identity.controller_url.rstrip('/')}/v1/devices/{identity.device}/desired"
    asked_at, began = time.time(), time.monotonic()
    try:
        async with (
            open_session(identity.device_token, settings.ca_file) as session,
            (await session.client()).get(url, allow_redirects=False) as response,
        ):
            took_s = time.monotonic() - began
            if response.status != HTTPStatus.OK:
                body = await response.content.read(PROBLEM_BYTES_MAX)
                raise problem_error(response.status, body, "a poll for orders")
            date = response.headers.get("Date", "")
    except aiohttp.ClientConnectorCertificateError as error:
        fix = "set ca_file to the CA that signed the controller's certificate, and check this device's clock"
        raise Unavailable(f"the controller's certificate is not trusted: {error}", fix=fix) from error
    except (aiohttp.ClientError, OSError) as error:
        raise unreachable(error) from error
    return judging.Answer(where=identity.controller_url, took_s=took_s, ahead_s=_ahead(asked_at + took_s / 2, date))


def _ahead(now: float, date: str) -> float | None:
    """How far `now` is ahead of a Date header; half a second is what such a header leaves out on average."""
    try:
        return now - parsedate_to_datetime(date).timestamp() - 0.5
    except ValueError:
        return None


async def _broker(identity: Identity, settings: AgentSettings) -> list[Finding]:
    """A login beside the running agent's: with a client id of our own, and no will that could declare it dead."""

    async def log_in() -> list[Finding]:
        began = time.monotonic()
        try:
            host, port, secure = parse_broker_url(identity.broker.url)
            endpoint = Endpoint(
                host=host,
                port=port,
                username=identity.broker.username,
                password=identity.broker.password,
                client_id=f"{identity.device}-doctor-{secrets.token_hex(4)}",
                tls=tls_context(settings.ca_file) if secure else None,
            )
            connection = Connection(endpoint, None, lambda _topic, _payload: None)
            try:
                await connection.open()
                took_s = time.monotonic() - began
                await connection.close()
            finally:
                await connection.abort()
        except FerryError as error:
            return [judging.broker(error)]
        return [judging.broker(judging.Answer(where=identity.broker.url, took_s=took_s))]

    return await _within("broker", BROKER_S, log_in())


async def _agent(settings: AgentSettings) -> list[Finding]:
    run = find_run(settings.data)
    if run is None:
        return judging.agent(judging.Running())
    facts = judging.Running(pid=run.pid, url=run.inference_url)
    with contextlib.suppress(aiohttp.ClientError, OSError, msgspec.DecodeError):
        async with (
            asyncio.timeout(AGENT_S),
            aiohttp.ClientSession() as session,
            session.get(f"{run.inference_url.rstrip('/')}/status", allow_redirects=False) as response,
        ):
            if response.status == HTTPStatus.OK:
                told = msgspec.json.decode(await response.read(), type=_Told)
                facts = msgspec.structs.replace(facts, ready=True, connected=told.connected, refused=told.refused)
    return judging.agent(facts)


class _Told(msgspec.Struct, frozen=True):
    """What of `GET /status` matters here."""

    connected: bool = False
    refused: str = ""


async def _slots(settings: AgentSettings, states: Iterable[ModelState]) -> list[Finding]:
    """Every byte of every release; those in service first, as the time is limited."""
    wanted = sorted(_releases(states), key=lambda entry: not entry[2])
    found: list[judging.SlotCheck] = []
    if not (settings.data / "models").is_dir():
        return []

    def look() -> list[Finding]:
        slots = Slots(settings.data)
        for state, release, serves in wanted:
            whole = slots.verify(state.model, release.slot, release.files, release.manifest)
            named = judging.name(state.model, release.version)
            found.append(judging.SlotCheck(release=named, serves=serves, whole=whole))
        return [judging.slots(found, 0)]

    try:
        async with asyncio.timeout(SLOTS_S):
            return await run_niced(look, "doctor-slots")
    except TimeoutError:
        return [judging.slots(tuple(found), len(wanted) - len(found))]
    except OSError as error:
        return [judging.problem("models", f"cannot be read: {error}", "suspect the disk; see the system's log")]


def _releases(states: Iterable[ModelState]) -> list[tuple[ModelState, Installed, bool]]:
    """The releases that the journal says are in a slot, and whether each is in service."""
    return [
        (state, release, release is state.installed)
        for state in states
        for release in (state.installed, state.previous)
        if release is not None
    ]


async def _spool(settings: AgentSettings) -> list[Finding]:
    path = settings.data / SPOOL_FILE

    def look() -> list[Finding]:
        set_aside = path.with_name(path.name + UNREADABLE_SUFFIX).exists()
        if not path.exists():
            return []
        try:
            waiting, lost = counts(path)
        except sqlite3.Error as error:
            fix = "nothing: the agent sets it aside when it starts; then suspect the disk"
            return [judging.warning("telemetry", f"telemetry.db cannot be read: {error}", fix)]
        limit, used = settings.telemetry_bytes_max, path.stat().st_size
        facts = judging.SpoolState(waiting=waiting, lost=lost, bytes=used, bytes_max=limit, set_aside=set_aside)
        return [judging.spool(facts)]

    return await _within("telemetry", DISK_S, run_niced(look, "doctor-spool"))
