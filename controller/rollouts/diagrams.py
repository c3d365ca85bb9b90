"""The state diagrams of docs/explanation/rollouts.md, drawn from `transitions` so that they cannot be wrong.

`weave` takes the document's text and gives it back with the block between each pair of markers redrawn:

    <!-- diagram: rollout -->
    ...anything; it is replaced...
    <!-- end diagram -->

Reading and writing the file is left to the test that compares them (tests/unit/test_rollout_diagrams.py).
"""

import re
from typing import Any

from controller.rollouts.transitions import EXECUTIONS, PHASES, ROLLOUTS, Table

TABLES: dict[str, Table[Any, Any]] = {table.name: table for table in (ROLLOUTS, PHASES, EXECUTIONS)}

_BLOCK = re.compile(r"<!-- diagram: (?P<name>\w+) -->\n.*?<!-- end diagram -->", re.DOTALL)


def mermaid(table: Table[Any, Any]) -> str:
    """The table as a Mermaid state diagram; events that lead the same way share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, event), to in table.moves.items():
        arrows.setdefault((state.value, to.value), []).append(event.value)
    lines = [f"    {origin} --> {to}: {', '.join(events)}" for (origin, to), events in arrows.items()]
    leavable = {origin for origin, to in arrows if origin != to}
    ends = [f"    {state.value} --> [*]" for state in table.states if state.value not in leavable]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {table.initial.value}", *lines, *ends])


def weave(document: str) -> str:
    """`document` with every marked diagram redrawn; a marker with an unknown name raises `KeyError`."""

    def redraw(block: re.Match[str]) -> str:
        name = block["name"]
        return f"<!-- diagram: {name} -->\n```mermaid\n{mermaid(TABLES[name])}\n```\n<!-- end diagram -->"

    return _BLOCK.sub(redraw, document)
