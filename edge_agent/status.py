"""What a device runs, read from its own disk, and whether its agent answers: `ferry-agent status`.

The journal is the truth about models, whether the agent runs or not; it is read in place and nothing is changed.
"""

import asyncio
from pathlib import Path

import aiohttp
import msgspec

from common.ids import DeviceId
from common.wire import ReportedModel
from edge_agent.identity import Identity
from edge_agent.journal import FILE_NAME, Journal
from edge_agent.running import find_run
from edge_agent.update import reported_model

READY_TIMEOUT_S = 2.0
COLUMNS = ("MODEL", "RUNNING", "PHASE", "TARGET", "LAST UPDATE")


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What `ferry-agent status -o json` prints.

    `ready` is whether the inference API says that it can answer; `not_modified` counts the polls answered 304.
    """

    device: DeviceId
    controller_url: str
    broker_url: str
    running: bool
    pid: int | None
    inference_url: str | None
    ready: bool
    generation: int
    not_modified: int
    models: tuple[ReportedModel, ...]


async def read_status(data: Path, identity: Identity) -> Status:
    """The state of the agent that lives in the folder `data`."""
    run = find_run(data)
    generation, not_modified, models = await asyncio.to_thread(_read_journal, data / FILE_NAME)
    return Status(
        device=identity.device,
        controller_url=identity.controller_url,
        broker_url=identity.broker.url,
        running=run is not None,
        pid=run.pid if run else None,
        inference_url=run.inference_url if run else None,
        ready=await _is_ready(run.inference_url) if run else False,
        generation=generation,
        not_modified=not_modified,
        models=models,
    )


def as_table(status: Status) -> str:
    """The status for people: a few lines and a table of the models."""
    lines = [
        f"device      {status.device}",
        f"controller  {status.controller_url}",
        f"agent       {_agent_line(status)}",
        f"order       generation {status.generation}, {status.not_modified} polls without news",
        "",
    ]
    if not status.models:
        return "\n".join([*lines, "no models yet"])
    rows = [COLUMNS, *(_row(model) for model in status.models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"{model.model} waits: {model.detail}" for model in status.models if model.detail])


def _agent_line(status: Status) -> str:
    if not status.running:
        return "not running"
    return f"process {status.pid}, inference at {status.inference_url} ({'ready' if status.ready else 'not ready'})"


def _row(model: ReportedModel) -> tuple[str, ...]:
    last = model.last_update
    ended = (
        f"{last.version} {last.outcome}" + (f": {last.detail or last.reason}" if last.reason else "") if last else "-"
    )
    return model.model, model.running or "-", model.phase, model.target or "-", ended


def _read_journal(path: Path) -> tuple[int, int, tuple[ReportedModel, ...]]:
    if not path.exists():
        return 0, 0, ()
    journal = Journal(path, repair=False)
    try:
        states = sorted(journal.load().items())
        return journal.generation, journal.number("not_modified"), tuple(reported_model(state) for _, state in states)
    finally:
        journal.close()


async def _is_ready(inference_url: str) -> bool:
    timeout = aiohttp.ClientTimeout(total=READY_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{inference_url.rstrip('/')}/v2/health/ready", allow_redirects=False) as response,
        ):
            return response.status == 200
    except (aiohttp.ClientError, OSError):
        return False
