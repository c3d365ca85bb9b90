"""Serving on the device: ours beside ONNX Runtime alone and beside other servers, on real models.

Every server is a process tree of its own and serves the same file with the same engine options; `wrk` asks. For each
model all servers are started, then they take turns in short rounds (the others are stopped meanwhile), so that a busy
moment of the machine hits all of them. Ratios are of one round, and the median round counts.

`QUICK=1` takes few short rounds. While developing, `MODELS=silero-vad` chooses models and `ONLY=ours,fastapi` servers:
then the tables are only printed, because the page shows a complete run.
"""

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.agent import batching, goals, library, load, page, raw, swaps
from benchmarks.agent.figures import RAW_ALL, RAW_ONE, Turn, Turns
from benchmarks.agent.models import BenchModel, batched, models
from benchmarks.agent.servers import KINDS, OURS, Kind, Server, installed
from benchmarks.report import Row, quick, write

ROUNDS: Final = 2 if quick() else 9
TURN_S: Final = 1 if quick() else 3
CLIENTS: Final = (1, 8, 64)
LIBRARY_REQUESTS: Final = 200 if quick() else 2_000
LEARNING_S: Final = 5 if quick() else 15
SWAPS: Final = 10 if quick() else 60
IDLE_S: Final = 10.0 if quick() else 60.0

INTRO: Final = """
Every server is a process tree of its own and serves the same file with ONNX Runtime, one thread inside an operator
and no spinning. `wrk` (one thread) posts the same inputs on as many connections as there are clients; CPU is user and
system time of the server's tree, without the load's. `raw` is ONNX Runtime in a loop, without any server. Servers
take turns in rounds, the others stopped (SIGSTOP) meanwhile; ratios are of one round, and the median round counts. On
a machine with few cores `wrk` takes its share of them from the server, so throughput is a little less than it could
be.

`ours` gets Open Inference Protocol V2 with binary tensors, on the agent's HTTP API. The others, in what we found to
be their fastest sensible configuration: `fastapi`, one uvicorn process with uvloop and httptools, inference on the
thread pool, the bare bytes of the tensors as body; `litserve`, a worker for each core, the fast queue, base64 in
JSON, as it takes no other body; `bentoml`, one worker with a thread for each core, bare bytes; `mlserver`, no worker
processes, a thread for each core, V2 with numbers in JSON, as its REST API takes no binary tensors. A server that
knows its model's shapes and takes bare bytes does less than ours, which checks names, types and shapes of every
request.

Batches: rows each second of one thread. The fixed sizes run in ONNX Runtime alone, already put together; the learned
ones are those of 64 callers with one row each, through the library.
"""


def main() -> None:
    if not load.installed():
        sys.exit("wrk makes the load and is not installed; on Debian: apt-get install wrk")
    chosen, kinds, busy = _models(), _kinds(), os.getloadavg()[0]
    turns = Turns([turn for model in chosen for turn in _turns(model, kinds)])
    measured = asyncio.run(_in_this_process()) if len(chosen) == len(models()) else None
    peers = [kind.name for kind in kinds if kind.name != OURS]
    if measured is None or os.environ.get("ONLY"):
        print(page.body(turns, [], [], {model.name: model.about for model in chosen}))
        return
    small, *larger = [model.name for model in chosen]
    rows = [*goals.of_turns(turns, small, larger, peers), *measured[0]]
    text = page.body(turns, rows, measured[1], {model.name: model.about for model in chosen})
    missing = [kind.name for kind in KINDS if kind not in kinds]
    text = page.warnings(short=quick(), load=busy, missing=missing) + text
    write("agent", "Serving on the device", [*rows, *goals.all_figures(turns)], INTRO, body=text)


def _turns(model: BenchModel, kinds: Sequence[Kind]) -> Iterator[Turn]:
    """All rounds with one model."""
    session = raw.session_of(model)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as running:
        servers = [running.enter_context(_started(kind, model, Path(logs))) for kind in kinds]
        for number in range(ROUNDS):
            print(f"{model.name}: round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
            for name, threads in ((RAW_ONE, 1), (RAW_ALL, cores)):
                yield Turn(number, model.name, name, 0, *raw.run(session, model, threads, TURN_S))
            for server in servers:
                with server.turn():
                    load.offer(server.url, server.body, 8, 1)  # threads, caches and batches settle
                    for clients in CLIENTS:
                        yield _turn(number, model, server, clients)


def _started(kind: Kind, model: BenchModel, logs: Path) -> Server:
    """A server that answers."""
    try:
        return _ready(kind, model, logs)
    except TimeoutError:
        return _ready(kind, model, logs)  # somebody else may have taken its port before it did


def _ready(kind: Kind, model: BenchModel, logs: Path) -> Server:
    server = Server(kind, model, logs / kind.name)
    try:
        server.wait_ready()
    except BaseException:
        server.__exit__()
        raise
    return server


def _turn(number: int, model: BenchModel, server: Server, clients: int) -> Turn:
    server.settle()
    before = server.cpu_s()
    result = load.offer(server.url, server.body, clients, TURN_S)
    return Turn(number, model.name, server.kind.name, clients, result, server.cpu_s() - before)


async def _in_this_process() -> tuple[list[Row], list[batching.Batched]]:
    """What needs no other process: the library, batches, swaps."""
    print("library, batches, swaps", file=sys.stderr, flush=True)
    waits = [await library.compare(model, LIBRARY_REQUESTS) for model in models()]
    batches = [await batching.compare(model, ROUNDS, TURN_S, LEARNING_S) for model in batched()]
    swapping = await swaps.measure(models()[-1], SWAPS, IDLE_S)
    return [*goals.of_library(waits), *goals.of_batching(batches), *goals.of_swaps(swapping)], batches


def _models() -> list[BenchModel]:
    names = _named("MODELS", [model.name for model in models()])
    return [model for model in models() if not names or model.name in names]


def _kinds() -> list[Kind]:
    names = _named("ONLY", [kind.name for kind in KINDS])
    for kind in KINDS:
        if not installed(kind):
            print(f"{kind.name} is not installed, left out", file=sys.stderr)
    return [kind for kind in KINDS if installed(kind) and (not names or kind.name in names)]


def _named(variable: str, known: Sequence[str]) -> set[str]:
    names = set(filter(None, os.environ.get(variable, "").split(",")))
    if unknown := names - set(known):
        sys.exit(f"{variable} names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
