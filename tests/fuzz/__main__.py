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
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.targets import TARGETS, kept

FUZZ_S_DEFAULT = 1800
INPUT_BYTES_MAX = 64 * 1024
RUN_S_MAX = 5
"""A slower run is a finding."""
PROCESS_S_MAX = 120
"""Then another process goes on with what was learnt: atheris 3.0 never frees the results of comparisons of arrays."""
PROCESS_MB_MAX = 2048
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
    runs = int(os.environ.get("FUZZ_RUNS") or 0)
    share = max(1, int(os.environ.get("FUZZ_S") or FUZZ_S_DEFAULT) // len(names))
    (OUT / "findings").mkdir(parents=True, exist_ok=True)
    tried = []
    for name in names:
        each = _counted(name, runs) if runs else _timed(name, share)
        _say(f"{name:15} {each.runs:>10} runs, coverage {each.coverage:>5}" + ", FINDING" * bool(each.finding))
        tried.append(each)
    found = [each for each in tried if each.finding]
    for each in found:
        _say(f"\n{each.target}:\n{each.finding}")
    _say(f"{sum(each.runs for each in tried)} runs, {len(found)} findings" + f" in {OUT}/findings" * bool(found))
    return 1 if found else 0


def _counted(name: str, runs: int) -> Tried:
    # The entropic schedule looks at the clock, so it would not be the same runs again.
    with tempfile.TemporaryDirectory() as corpus:
        return _fuzz(name, [f"-runs={runs}", "-seed=1", "-entropic=0"], Path(corpus))


def _timed(name: str, share_s: int) -> Tried:
    corpus = OUT / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    tried = Tried(name, 0, 0, "")
    for done in range(0, share_s, PROCESS_S_MAX):
        more = _fuzz(name, [f"-max_total_time={min(PROCESS_S_MAX, share_s - done)}"], corpus)
        tried = Tried(name, tried.runs + more.runs, max(tried.coverage, more.coverage), more.finding)
        if tried.finding:
            break
    return tried


def _fuzz(name: str, amount: list[str], corpus: Path) -> Tried:
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


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
