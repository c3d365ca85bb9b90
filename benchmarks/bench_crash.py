"""Crashes of the agent at every operation on the disk, and during the recoveries from them.

Updates are recorded on a file system that writes every operation down. What the disk may hold after a crash at each is
built from the record, and the agent's own executor, journal, slots, fetcher and engine start on it (`tests/crash`).
`bench_kills` kills the real process instead.

`QUICK=1` tries few crashes, `ALL=1` every power cut of every kind and more pairs. `SEED=n` draws others. `WORKERS=n`
are tried side by side.
"""

import asyncio
import logging
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.report import Row, at_least, at_most, figure, quick, table, write
from tests.crash import recording
from tests.crash.exploring import Findings, Share, explore
from tests.crash.recording import Recorder
from tests.crash.stories import NAMES
from tests.crash.survey import Survey

COMMAND = "make bench-crash"
POINTS_MIN = 2000
WHOLE = Share(kills=1.0, power_cuts=0.25, recovered=6, pairs=6)
ALL = Share(kills=1.0, power_cuts=1.0, recovered=20, pairs=20)
SOME = Share(kills=0.03, power_cuts=0.03, recovered=1, pairs=5)

INTRO = """
Each row is an update that a device carries out (`tests/crash/stories.py`). It is recorded once, and then crashed in
front of every operation that changes the disk (creating, writing, syncing, renaming, linking and removing, SQLite's
included) and around every report. *killed*: the process dies and nothing is lost; all of these are tried. The other
three are power cuts: *all* that was not synced is lost, or the *late* part of it, or *any* of it in any order, with
torn writes; a quarter of these is drawn from the seed (`ALL=1` tries every one, `SEED=n` draws others). From what is
left the agent starts without a network, then goes on with the story. A *pair* is a crash during the recovery from a
crash; some recoveries, drawn from the seed, are recorded and crashed at operations drawn from it too, because all
pairs would be a hundred thousand. `tests/crash/invariants.py` says what must hold after each, `tests/crash/mutants.py`
has wrong agents that it catches.
"""


def main() -> None:
    if why := recording.available():
        sys.exit(f"crashes need FUSE: {why}")
    seed = int(os.environ.get("SEED", "1"))
    with ProcessPoolExecutor(int(os.environ.get("WORKERS", "2"))) as pool:
        found = list(pool.map(_explored, NAMES, [seed] * len(NAMES)))
    rows = _rows(found)
    write("crash", "Crashes", rows, INTRO, body=f"{_stories(found)}\n\n{table(rows)}")


def _explored(name: str, seed: int) -> Findings:
    return asyncio.run(_explore(name, seed))


async def _explore(name: str, seed: int) -> Findings:
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, Recorder(Path(folder)) as recorder:
        async with Survey(Path(folder) / "survey", recorder).open() as survey:
            story = survey.author().stories()[name]()
            findings = await explore(survey, story, _share(), seed)
    print(f"{name}: {sum(findings.crashes.values())} crashes, {findings.pairs} pairs", file=sys.stderr, flush=True)
    for one in findings.violations:
        print(f"{one.story!r} {one.where!r} {one.seed}: {one.what}", file=sys.stderr, flush=True)
    return findings


def _share() -> Share:
    if quick():
        return SOME
    return ALL if os.environ.get("ALL") else WHOLE


def _rows(found: list[Findings]) -> list[Row]:
    crashes = sum(sum(one.crashes.values()) for one in found)
    pairs = sum(one.pairs for one in found)
    violations = sum(len(one.violations) for one in found)
    least = 0 if quick() else POINTS_MIN
    return [
        figure("operations in all stories", measured=sum(one.operations for one in found), unit="", command=COMMAND),
        at_least("crash points", least, measured=crashes + pairs, unit="", command=COMMAND),
        figure("of them during a recovery", measured=pairs, unit="", command=COMMAND),
        at_most("promises broken", 0, measured=violations, unit="", command=COMMAND),
    ]


def _stories(found: list[Findings]) -> str:
    losses = list(found[0].crashes)
    lines = [
        f"| update | operations | {' | '.join(losses)} | pairs | broken promises |",
        f"| --- | ---: | {'---: | ' * len(losses)}---: | ---: |",
    ]
    for one in found:
        counts = " | ".join(str(one.crashes[loss]) for loss in losses)
        lines.append(f"| {one.story} | {one.operations} | {counts} | {one.pairs} | {len(one.violations)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
