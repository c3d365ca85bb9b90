"""The goals of serving, judged by what a run has measured. Pure."""

from collections.abc import Sequence
from typing import Final

from benchmarks.agent.batching import Batched
from benchmarks.agent.figures import RAW_ALL, RAW_ONE, Turns
from benchmarks.agent.library import Waits
from benchmarks.agent.servers import OURS
from benchmarks.agent.swaps import Swapping
from benchmarks.report import Row, at_least, at_most, figure

COMMAND: Final = "make bench-agent"
THROUGHPUT_MIN: Final = 0.95
"""Of ONNX Runtime with as many threads, for models that take milliseconds."""
SMALL_THROUGHPUT_MIN: Final = 0.8
"""Of one thread of ONNX Runtime, for the smallest model and many clients."""
OVERHEAD_MS_MAX: Final = 0.35
LIBRARY_P50_MAX: Final = 1.1
CPU_FACTOR_MIN: Final = 2.5
BATCH_LOSS_MAX: Final = 0.05
SWAP_P99_MAX: Final = 1.4


def of_turns(turns: Turns, small: str, larger: Sequence[str], peers: Sequence[str]) -> list[Row]:
    """Throughput, overhead and CPU over HTTP."""
    rows = [
        _at_least(
            f"{model}, 8 clients: throughput over HTTP to raw on all cores",
            THROUGHPUT_MIN,
            turns.against(model, (OURS, 8), (RAW_ALL, 0), lambda a, b: a.load.per_second / b.load.per_second),
        )
        for model in larger
    ]
    rows += [
        _at_least(
            f"{small}, 64 clients: throughput over HTTP to raw on one thread",
            SMALL_THROUGHPUT_MIN,
            turns.against(small, (OURS, 64), (RAW_ONE, 0), lambda a, b: a.load.per_second / b.load.per_second),
        ),
        at_most(
            f"{small}, 1 client: CPU that HTTP adds",
            OVERHEAD_MS_MAX,
            measured=turns.against(small, (OURS, 1), (RAW_ONE, 0), lambda a, b: a.cpu_ms - b.cpu_ms),
            unit="ms/request",
            command=COMMAND,
        ),
    ]
    if peers:
        rows.append(_against_the_best(turns, small, peers))
    return [*rows, at_most("requests that failed, all servers", 0, measured=turns.failed(), unit="", command=COMMAND)]


def _against_the_best(turns: Turns, model: str, peers: Sequence[str]) -> Row:
    def factor(peer: str) -> float:
        return turns.against(model, (peer, 8), (OURS, 8), lambda a, b: a.cpu_ms / b.cpu_ms)

    best = min(peers, key=factor)
    return _at_least(f"{model}, 8 clients: CPU of the best peer ({best}) to ours", CPU_FACTOR_MIN, factor(best))


def of_library(waits: Sequence[Waits]) -> list[Row]:
    """The way without HTTP."""
    return [
        at_most(
            f"{each.model}: p50 of the idle library to raw",
            LIBRARY_P50_MAX,
            measured=each.library_ms / each.raw_ms,
            unit="ratio",
            command=COMMAND,
        )
        for each in waits
    ]


def of_batching(measured: Sequence[Batched]) -> list[Row]:
    """Learned batches beside the best fixed one, and beside none."""
    rows = []
    for each in measured:
        best = each.ours / each.fixed[each.best]
        rows.append(
            _at_least(f"{each.model}: learned batches to the best fixed ({each.best})", 1 - BATCH_LOSS_MAX, best)
        )
        if each.best > 1:
            rows.append(_at_least(f"{each.model}: learned batches to batch 1", 1, each.ours / each.fixed[1]))
    return rows


def of_swaps(swapping: Swapping) -> list[Row]:
    """What callers notice of swaps."""
    busy, idle = swapping.busy, swapping.idle
    return [
        at_most(
            f"{swapping.swaps} swaps under traffic: failed requests",
            0,
            measured=busy.failed,
            unit=f"of {busy.sent}",
            command=COMMAND,
        ),
        at_most(
            f"{swapping.swaps} swaps under traffic: p99 to p99 without",
            SWAP_P99_MAX,
            measured=busy.p99_ms / idle.p99_ms,
            unit="ratio",
            command=COMMAND,
        ),
        figure("p99 without swaps", measured=idle.p99_ms, unit="ms", command=COMMAND),
    ]


def all_figures(turns: Turns) -> list[Row]:
    """Every median, for programs."""
    rows = []
    for model, server, clients in turns.keys():  # noqa: SIM118 (not a dict)
        what = f"{model}: {server}" + (f", {clients} clients" if clients else "")
        per_second = turns.middle(model, server, clients, lambda turn: turn.load.per_second)
        cpu_ms = turns.middle(model, server, clients, lambda turn: turn.cpu_ms)
        rows += [
            figure(f"{what}, throughput", measured=per_second, unit="requests/s", command=COMMAND),
            figure(f"{what}, CPU", measured=cpu_ms, unit="ms/request", command=COMMAND),
        ]
    return rows


def _at_least(what: str, limit: float, measured: float) -> Row:
    return at_least(what, limit, measured=measured, unit="ratio", command=COMMAND)
