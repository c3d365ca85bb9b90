"""The benchmark's page: goals first, then sizes of all pairs side by side, then what each pair cost. Pure."""

from collections.abc import Iterator, Sequence

from benchmarks.delta.figures import OURS, OURS_ZSTD_ONLY, PEERS, Outcome, PairFigures
from benchmarks.report import Row, number, table

TOOLS = (OURS, OURS_ZSTD_ONLY, *PEERS)


def body(figures: Sequence[PairFigures], goals: Sequence[Row]) -> str:
    """Markdown under the page's title and introduction."""
    parts = ["## Goals", table(goals), "## Patch size, % of the new file", "\n".join(_sizes(figures)), "## Each pair"]
    return "\n\n".join([*parts, *map(_costs, figures)])


def _sizes(figures: Sequence[PairFigures]) -> Iterator[str]:
    yield f"| pair | new file, bytes | {' | '.join(TOOLS)} | bound |"
    yield f"| --- | ---: |{' ---: |' * (len(TOOLS) + 1)}"
    for pair in figures:
        cells = [_percent(pair.bytes_of(tool), pair) for tool in TOOLS]
        smallest = pair.best_of(TOOLS)
        shown = [
            f"**{cell}**" if pair.bytes_of(tool) == smallest else cell for tool, cell in zip(TOOLS, cells, strict=True)
        ]
        yield f"| {pair.name} | {number(pair.new_bytes)} | {' | '.join(shown)} | {_percent(pair.bound_bytes, pair)} |"


def _costs(pair: PairFigures) -> str:
    bound = "" if pair.bound_bytes is None else f" Bound: {number(round(pair.bound_bytes))} bytes."
    lines = [f"### {pair.name}", "", f"{pair.about.capitalize()}. New file: {number(pair.new_bytes)} bytes.{bound}", ""]
    lines += ["| tool | bytes | % of full | create CPU s | apply CPU s | create MB | apply MB |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    lines += [_tool(outcome, pair) for outcome in pair.outcomes]
    return "\n".join(lines)


def _tool(outcome: Outcome, pair: PairFigures) -> str:
    if outcome.patch_bytes is None or outcome.create is None or outcome.apply is None:
        return f"| {outcome.tool} | {outcome.problem.replace('|', ' ')} | | | | | |"
    seconds = f"{outcome.create.cpu_s:.2f} | {outcome.apply.cpu_s:.3f}"
    memory = f"{outcome.create.peak_mb:.0f} | {outcome.apply.peak_mb:.0f}"
    percent = _percent(outcome.patch_bytes, pair)
    return f"| {outcome.tool} | {number(outcome.patch_bytes)} | {percent} | {seconds} | {memory} |"


def _percent(size: float | None, pair: PairFigures) -> str:
    return "" if size is None else f"{100 * size / pair.new_bytes:.3g}"
