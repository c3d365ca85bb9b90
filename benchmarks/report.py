"""How every benchmark reports: rows of what was wanted and what was measured, as JSON and as a page of the docs.

`python -m benchmarks.bench_NAME` measures, then calls `write`, which puts `benchmarks/results/NAME.json` (a list of
rows) and `docs/reference/benchmarks/NAME.md` in place and prints the table. With `QUICK=1` in the environment a
benchmark takes less than a minute. Absolute times are this machine's; trust ratios between rows of one run.

    rows = [at_most("patch of a small change", 5_000, measured=1_023, unit="bytes", command=COMMAND)]
    write("delta", "Patches", rows, "What a patch costs to make, to send and to apply.")
"""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec

from common.durable import write_file

ROOT = Path(__file__).resolve().parent.parent


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure. `goal` reads like `<= 5000` and is empty, with `met` None, where a figure is only for comparison."""

    what: str
    goal: str
    measured: float
    unit: str
    met: bool | None
    command: str


def at_most(what: str, limit: float, *, measured: float, unit: str, command: str) -> Row:
    """A figure that must not exceed `limit`."""
    goal = f"<= {_plain(limit)}"
    return Row(what=what, goal=goal, measured=measured, unit=unit, met=measured <= limit, command=command)


def at_least(what: str, limit: float, *, measured: float, unit: str, command: str) -> Row:
    """A figure that must reach `limit`."""
    goal = f">= {_plain(limit)}"
    return Row(what=what, goal=goal, measured=measured, unit=unit, met=measured >= limit, command=command)


def figure(what: str, *, measured: float, unit: str, command: str) -> Row:
    """A figure without a goal, such as what a peer needs for the same work."""
    return Row(what=what, goal="", measured=measured, unit=unit, met=None, command=command)


def quick() -> bool:
    """Whether the short form was asked for (`QUICK=1`)."""
    return os.environ.get("QUICK", "") not in {"", "0"}


def write(name: str, title: str, rows: Sequence[Row], intro: str, *, body: str = "", root: Path = ROOT) -> None:
    """Write the results of benchmark `name` under `root` and print them; `intro` opens the page.

    The page shows `rows` as a table, or `body` (Markdown) where a benchmark has a better form for many figures.
    """
    page = root / "docs" / "reference" / "benchmarks" / f"{name}.md"
    results = root / "benchmarks" / "results" / f"{name}.json"
    for path in (page, results):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(results, msgspec.json.format(msgspec.json.encode(list(rows)), indent=2) + b"\n")
    shown = body or table(rows)
    write_file(page, f"# {title}\n\n{intro.strip()}\n\n{shown}\n\n{_conditions(name)}\n".encode())
    print(f"{title}\n\n{shown}\n\nwritten to {results.relative_to(root)} and {page.relative_to(root)}")


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| what | goal | measured | unit | met |", "| --- | ---: | ---: | --- | --- |"]
    words = {True: "yes", False: "**no**", None: ""}
    lines += [f"| {row.what} | {row.goal} | {number(row.measured)} | {row.unit} | {words[row.met]} |" for row in rows]
    return "\n".join(lines)


def number(value: float) -> str:
    """For people: thousands apart."""
    return f"{int(value):,}".replace(",", " ") if float(value).is_integer() else _plain(value)


def _conditions(name: str) -> str:
    short = "QUICK=1 " if quick() else ""
    machine = f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs"
    return f"Measured with `{short}make bench-{name}` on {machine}. Run it again before relying on an absolute time."


def _plain(value: float) -> str:
    """For programs too: whole numbers as they are, others to four digits."""
    return str(int(value)) if float(value).is_integer() else f"{value:.4g}"
