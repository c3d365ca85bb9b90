"""Fuzzes every target, one after another, and says what was tried; fails when there is a finding.

Settings come from the environment. `FUZZ_S` is for how many seconds in all (default 1800); what was learnt is kept in
`.fuzz/corpus` for the next time. With `FUZZ_RUNS` there are so many runs of each target instead, always the same ones
as long as the code is the same. `FUZZ_TARGETS` names targets, with commas, if not all. An input that fails is written
to `.fuzz/findings`.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.targets import TARGETS, kept

FUZZ_S_DEFAULT = 1800
INPUT_BYTES_MAX = 64 * 1024
RUN_S_MAX = 5
"""A slower run is a finding."""
PROCESS_MB_MAX = 1024
"""Of a whole process: more is a leak."""
OUT = Path(".fuzz")


class Tried(NamedTuple):
    """What libFuzzer says of one target: runs, edges of the code that were reached, and the end of what it printed
    when it found something.
    """

    target: str
    runs: int
    coverage: int
    finding: str


def main() -> int:
    names = [name for name in os.environ.get("FUZZ_TARGETS", "").split(",") if name] or list(TARGETS)
    counted = os.environ.get("FUZZ_RUNS")
    share = max(1, int(os.environ.get("FUZZ_S") or FUZZ_S_DEFAULT) // len(names))
    # The entropic schedule looks at the clock, so it would not be the same runs again.
    amount = [f"-runs={counted}", "-seed=1", "-entropic=0"] if counted else [f"-max_total_time={share}"]
    tried = []
    for name in names:
        with _corpus(name, keep=not counted) as corpus:
            tried.append(_fuzz(name, amount, corpus))
        _say(
            f"{name:15} {tried[-1].runs:>10} runs, coverage {tried[-1].coverage:>5}"
            + ", FINDING" * bool(tried[-1].finding)
        )
    found = [each for each in tried if each.finding]
    for each in found:
        _say(f"\n{each.target}:\n{each.finding}")
    _say(f"{sum(each.runs for each in tried)} runs, {len(found)} findings" + f" in {OUT}/findings" * bool(found))
    return 1 if found else 0


def _fuzz(name: str, amount: list[str], corpus: Path) -> Tried:
    (OUT / "findings").mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate((*TARGETS[name].seeds(), *kept(name).values())):
        (corpus / f"seed-{number:04}").write_bytes(seed)
    options = [
        *amount,
        f"-max_len={INPUT_BYTES_MAX}",
        f"-timeout={RUN_S_MAX}",
        f"-rss_limit_mb={PROCESS_MB_MAX}",
        f"-artifact_prefix={OUT}/findings/{name}-",
        "-print_final_stats=1",
    ]
    # One arena: threads must not reserve address space of their own, of which each run has a limit.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    child = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.child", name, *options, str(corpus)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    said = child.stdout.decode(errors="replace")
    runs, coverage = (re.findall(pattern, said) for pattern in (r"number_of_executed_units: (\d+)", r"cov: (\d+)"))
    return Tried(name, int((runs or ["0"])[-1]), int((coverage or ["0"])[-1]), said[-4000:] if child.returncode else "")


@contextmanager
def _corpus(name: str, *, keep: bool) -> Iterator[Path]:
    if keep:
        folder = OUT / "corpus" / name
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
