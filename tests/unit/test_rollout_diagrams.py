"""The state diagrams in docs/explanation/rollouts.md are those of the tables.

Run as a program (`python -m tests.unit.test_rollout_diagrams`) it draws them again.
"""

from pathlib import Path

from controller.rollouts.diagrams import TABLES, mermaid, weave

DOCUMENT = Path(__file__).parents[2] / "docs/explanation/rollouts.md"


def test_the_diagrams_in_the_docs_are_up_to_date() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == weave(text), "draw them again: python -m tests.unit.test_rollout_diagrams"
    assert all(f"<!-- diagram: {name} -->" in text for name in TABLES)


def test_a_diagram_shows_every_move() -> None:
    for table in TABLES.values():
        drawn = mermaid(table)
        for (state, event), to in table.moves.items():
            (line,) = [line for line in drawn.splitlines() if line.startswith(f"    {state.value} --> {to.value}:")]
            assert event.value in line


if __name__ == "__main__":
    DOCUMENT.write_text(weave(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
