"""What a benchmark leaves behind: rows that programs can read, and a page that people can."""

import json
from pathlib import Path

import pytest

from benchmarks.report import at_least, at_most, figure, quick, write

ROWS = [
    at_most("patch", 5_000, measured=996, unit="bytes", command="make bench-x"),
    at_least("speed", 2.5, measured=1.25, unit="times", command="make bench-x"),
    figure("peer", measured=3278.0, unit="bytes", command="make bench-x"),
]


def test_the_rows_are_json_with_exactly_the_agreed_fields(tmp_path: Path) -> None:
    write("x", "Title", ROWS, "Intro.", root=tmp_path)
    rows = json.loads((tmp_path / "benchmarks/results/x.json").read_text())
    assert [set(row) for row in rows] == [{"what", "goal", "measured", "unit", "met", "command"}] * 3
    assert [(row["goal"], row["met"]) for row in rows] == [("<= 5000", True), (">= 2.5", False), ("", None)]


def test_the_page_shows_the_figures_and_how_they_were_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK", "1")
    write("x", "Title", ROWS, "Intro.", root=tmp_path)
    page = (tmp_path / "docs/reference/benchmarks/x.md").read_text()
    assert page.startswith("# Title\n\nIntro.\n\n| what |")
    assert "| patch | <= 5000 | 996 | bytes | yes |" in page
    assert "| speed | >= 2.5 | 1.25 | times | **no** |" in page
    assert "`QUICK=1 make bench-x`" in page


@pytest.mark.parametrize(("value", "short"), [("", False), ("0", False), ("1", True)])
def test_quick_is_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch, value: str, short: bool) -> None:
    monkeypatch.setenv("QUICK", value)
    assert quick() is short
