"""The pictures in docs/explanation/update-machine.md, drawn from the table that runs the machine.

`weave` takes the page's text and gives it back with what stands between each pair of markers drawn again:

    <!-- drawn: diagram -->
    ...anything; it is replaced...
    <!-- end -->
"""

import re

from edge_agent.update.machine import IGNORED, MOVES
from edge_agent.update.state import Stage

_BLOCK = re.compile(r"<!-- drawn: (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)


def weave(text: str) -> str:
    """`text` with every marked block as it should be."""
    parts = {
        "diagram": f"```mermaid\n{mermaid()}\n```",
        "moves": rows(),
        "ignored": ignored_rows(),
        "restart": restart_rows(),
    }
    return _BLOCK.sub(lambda block: f"<!-- drawn: {block['name']} -->\n{parts[block['name']]}\n<!-- end -->", text)


def mermaid() -> str:
    """The arrows between different stages; what stays where it is is in `rows`."""
    arrows: dict[tuple[Stage, Stage], list[str]] = {}
    for stage in Stage:
        for move in MOVES:
            for target in sorted(move.to - {stage}) if stage in move.stages else ():
                words = arrows.setdefault((stage, target), [])
                if move.words not in words:
                    words.append(move.words)
    lines = [f"    {source} --> {target}: {', '.join(words)}" for (source, target), words in arrows.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {Stage.IDLE}", *lines])


def rows() -> str:
    """One Markdown row per move: event, stages, where it leads, what it does."""
    lines = ["| event | in | leads to | what happens |", "| --- | --- | --- | --- |"]
    for move in MOVES:
        doc = (move.act.__doc__ or "").strip().splitlines()[0]
        lines.append(f"| {move.event.__name__} | {_names(move.stages)} | {_names(move.to) or 'itself'} | {doc} |")
    return "\n".join(lines)


def ignored_rows() -> str:
    """One Markdown row per event that some stages ignore."""
    lines = ["| event | ignored in |", "| --- | --- |"]
    lines += [f"| {event.__name__} | {_names(stages)} |" for event, stages in IGNORED.items()]
    return "\n".join(lines)


def restart_rows() -> str:
    """One Markdown row per stage: what a restart does."""
    lines = ["| saved stage | what a restart does |", "| --- | --- |"]
    for stage in Stage:
        act = next(m.act for m in MOVES if m.event.__name__ == "Restarted" and stage in m.stages)
        lines.append(f"| {stage} | {(act.__doc__ or '').strip().splitlines()[0]} |")
    return "\n".join(lines)


def _names(stages: frozenset[Stage]) -> str:
    return ", ".join(stage for stage in Stage if stage in stages)
