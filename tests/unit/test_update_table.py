"""The update machine's table names every (stage, event) pair exactly once, and the docs show it as it is.

Run as a program (`python -m tests.unit.test_update_table`) it draws the page's pictures again.
"""

from pathlib import Path

from edge_agent.update import events as ev
from edge_agent.update.diagram import weave
from edge_agent.update.machine import IGNORED, MOVES, TABLE
from edge_agent.update.state import Stage

PAGE = Path(__file__).parents[2] / "docs/explanation/update-machine.md"
EVENTS = [kind for kind in vars(ev).values() if isinstance(kind, type) and issubclass(kind, ev.Event)]
BASES = {ev.Event, ev.WorkEnded}


def test_every_pair_either_moves_or_is_ignored() -> None:
    for event in (kind for kind in EVENTS if kind not in BASES):
        for stage in Stage:
            moves = [move for move in MOVES if move.event is event and stage in move.stages]
            ignored = stage in IGNORED.get(event, frozenset())
            assert len(moves) + ignored == 1, (stage, event.__name__)


def test_the_table_has_no_pair_twice() -> None:
    assert len(TABLE) == sum(len(move.stages) for move in MOVES)


def test_the_page_shows_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == weave(text), "draw it again: python -m tests.unit.test_update_table"
    assert all(f"<!-- drawn: {part} -->" in text for part in ("diagram", "moves", "ignored", "restart"))


if __name__ == "__main__":
    PAGE.write_text(weave(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
