"""What patches cost: bytes, CPU time and memory, ours beside every other tool, on pairs of real models.

All tools are measured on a pair before the next pair is begun. A complete run takes hours (two of the tools need
minutes for each large pair), so what is measured is kept: a run that was broken off goes on where it was, and only what
changed code or files could change is measured again (`benchmarks/delta/kept.py`). `FRESH=1` measures everything again.

`QUICK=1` takes the small pairs. While developing, `PAIRS=a,b` chooses pairs and `ONLY=ours,bsdiff4` or
`WITHOUT=bsdiff4,HDiffPatch` chooses tools: then the tables are only printed, because the page shows a complete run.
`KEPT=1` measures nothing and writes the page from what is kept, with the pairs for which all tools were measured; it
names the others.
"""

import os
import sys
from collections.abc import Sequence

from benchmarks.delta import bounds, goals, kept, page, pairs, peers, tensors
from benchmarks.delta.figures import Outcome, PairFigures
from benchmarks.delta.pairs import Pair
from benchmarks.delta.peers import Tool
from benchmarks.report import quick, write

INTRO = """
Each tool makes a patch from the old file of a pair to the new one and applies it, in processes of their own, all
tools on a pair one after another. `ours` is `common/delta`, `ours (zstd only)` what devices without pcodec get. `zstd
-19` sends the new file alone. HDiffPatch is the smallest of its uncompressed form and two compressors, ZipNN the
exclusive-or where both files have one size. Memory is the peak RSS of the whole process, in MB of 2^20 bytes; CPU
seconds are user and system time, for the Python libraries without starting Python. Apply times are the least of
three. Ours include SHA-256 of the old file and the new, which no other tool checks.

The bound is the conditional entropy of the differences of changed weights, given the exponents of the old ones, tensor
by tensor (`benchmarks/delta/bounds.py`); it is left out where tensors have no partner. Where the change itself is
foreseen (pruned, merged low rank, whole rows) a patch can be far under it. `magika`, `nudenet` and `ddddocr` are
releases on PyPI; `minilm` is trained by `benchmarks/delta/make_pairs.py` with fixed seeds, so that its figures differ
a little between machines, as torch's arithmetic does.
"""


def main() -> None:
    wanted, tools = _pairs(), _tools()
    pairs.prepare(wanted)
    measure = _kept if os.environ.get("KEPT") else _measured
    figures = {pair.name: measure(pair, tools) for pair in wanted}
    complete = [found for found in figures.values() if found]
    rows = goals.goals(complete)
    text = page.body(complete, rows)
    if missing := [name for name, found in figures.items() if not found]:
        text = f"**Not measured with every tool yet:** {', '.join(missing)}.\n\n{text}"
    if any(os.environ.get(choice) for choice in ("PAIRS", "ONLY", "WITHOUT")):
        print(text)
        return
    write("delta", "Patches", [*rows, *goals.all_figures(complete)], INTRO, body=text)


def _pairs() -> Sequence[Pair]:
    names = _named("PAIRS", [pair.name for pair in pairs.ALL])
    some = pairs.QUICK if quick() else pairs.ALL
    return [pair for pair in pairs.ALL if pair.name in names] if names else some


def _tools() -> list[Tool]:
    known = [tool.name for tool in peers.TOOLS]
    only, without = _named("ONLY", known), _named("WITHOUT", known)
    for tool in peers.TOOLS:
        if not tool.installed():
            print(f"{tool.name} is not installed, left out", file=sys.stderr)
    chosen = (only or set(known)) - without
    return [tool for tool in peers.TOOLS if tool.installed() and tool.name in chosen]


def _named(variable: str, known: Sequence[str]) -> set[str]:
    names = set(filter(None, os.environ.get(variable, "").split(",")))
    if unknown := names - set(known):
        sys.exit(f"{variable} names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names


def _measured(pair: Pair, tools: Sequence[Tool]) -> PairFigures | None:
    outcomes = []
    for number, tool in enumerate(tools, start=1):
        print(f"{pair.name}: {tool.name} ({number} of {len(tools)})", file=sys.stderr, flush=True)
        outcomes.append(kept.recall(pair, tool) or kept.keep(pair, tool, peers.measure(tool, pair)))
    return _figures(pair, outcomes)


def _kept(pair: Pair, tools: Sequence[Tool]) -> PairFigures | None:
    outcomes = [outcome for tool in tools if (outcome := kept.recall(pair, tool))]
    return _figures(pair, outcomes) if len(outcomes) == len(tools) else None


def _figures(pair: Pair, outcomes: Sequence[Outcome]) -> PairFigures:
    found = bounds.bound(tensors.of_file(pair.old), tensors.of_file(pair.new))
    return PairFigures(
        name=pair.name,
        about=pair.about,
        new_bytes=pair.new.stat().st_size,
        bound_bytes=found.bytes if found.bytes and not found.unmatched_bytes else None,
        outcomes=tuple(outcomes),
    )


if __name__ == "__main__":
    main()
