"""The benchmark's page: goals first, then every model with all servers side by side, then batches. Pure."""

from collections.abc import Iterator, Sequence
from typing import Final

from benchmarks.agent.batching import Batched
from benchmarks.agent.figures import Turns
from benchmarks.report import Row, table

BUSY_LOAD: Final = 0.5
"""Programs running at the same time; more than that spoils the figures."""


def body(turns: Turns, goals: Sequence[Row], batched: Sequence[Batched], about: dict[str, str]) -> str:
    """Markdown under the page's title and introduction."""
    parts = ["## Goals", table(goals)]
    for model, words in about.items():
        parts += [f"## {model}: {words}", "\n".join(_servers(turns, model))]
    return "\n\n".join([*parts, "## Batches, rows/s of one thread", "\n".join(_batches(batched))])


def warnings(*, short: bool, load: float, missing: Sequence[str]) -> str:
    """What a reader must know before the figures: paragraphs in bold, none if all is well. `load` is the machine's mean
    number of running programs before the run began.
    """
    said = []
    if short:
        said.append(
            "**A short run: turns of a second are too short to rely on, most of all for batches of large models.**"
        )
    if load > BUSY_LOAD:
        said.append(f"**The machine was busy with other programs (a load of {load:.1f}) when the run began.**")
    if missing:
        said.append(f"**Not installed here, so not measured:** {', '.join(missing)}.")
    return "".join(f"{words}\n\n" for words in said)


def _servers(turns: Turns, model: str) -> Iterator[str]:
    yield "| server | clients | requests/s | CPU ms/request | p50 ms | p99 ms |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for measured, server, clients in turns.keys():  # noqa: SIM118 (not a dict)
        if measured != model:
            continue
        figures = [
            turns.middle(model, server, clients, lambda turn: turn.load.per_second),
            turns.middle(model, server, clients, lambda turn: turn.cpu_ms),
            turns.middle(model, server, clients, lambda turn: turn.load.p50_ms),
            turns.middle(model, server, clients, lambda turn: turn.load.p99_ms),
        ]
        yield f"| {server} | {clients or ''} | {' | '.join(f'{value:.4g}' for value in figures)} |"


def _batches(batched: Sequence[Batched]) -> Iterator[str]:
    sizes = list(batched[0].fixed) if batched else []
    yield f"| model | {' | '.join(f'fixed {size}' for size in sizes)} | learned |"
    yield f"| --- |{' ---: |' * (len(sizes) + 1)}"
    for each in batched:
        cells = [f"**{value:.4g}**" if size == each.best else f"{value:.4g}" for size, value in each.fixed.items()]
        yield f"| {each.model} | {' | '.join(cells)} | {each.ours:.4g} |"
