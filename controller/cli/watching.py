"""Following a rollout: the server's events say when to look, and a slow poll looks anyway, so nothing is ever missed.

On a terminal the picture is redrawn in place; elsewhere each change is a line.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from common.errors import FerryError, Unavailable
from controller.cli.output import Output
from controller.cli.phases import phase_rows, reach_of
from controller.rollouts.model import TERMINAL_ROLLOUT_STATES, ExecutionState, PhaseState, RolloutState

if TYPE_CHECKING:
    from rich.console import RenderableType

    from controller.client import FerryClient
    from controller.resources import PhaseView, RolloutView

POLL_S = 2.0
"""How often to look when no event says so."""
LOOK_AGAIN_S = 0.2
"""The shortest time between two looks, however many events come."""
GIVE_UP_S = 60.0
"""How long the controller may be away."""
BAR_CELLS = 12


def watch_rollout(ferry: "FerryClient", output: Output, rollout: str) -> int:
    """Show `rollout` until it ends; the exit code."""
    on_terminal = output.is_table and sys.stdout.isatty()
    view = _draw(ferry, rollout) if on_terminal else _print_lines(ferry, output, rollout)
    return 0 if view.state is RolloutState.SUCCEEDED else 1


def views(ferry: "FerryClient", rollout: str) -> Iterator["RolloutView"]:
    """The rollout as it is now and each time it may have changed, the last time when it has ended.

    While the controller is away it waits, for `GIVE_UP_S` at most; then `Unavailable`.
    """
    changed, over = threading.Event(), threading.Event()
    listener = threading.Thread(target=_listen, args=(ferry, rollout, changed, over), daemon=True)
    listener.start()
    heard_at = time.monotonic()
    try:
        while True:
            changed.clear()
            try:
                view = ferry.rollout(rollout)
            except Unavailable:
                if time.monotonic() - heard_at > GIVE_UP_S:
                    raise
            else:
                heard_at = time.monotonic()
                yield view
                if view.state in TERMINAL_ROLLOUT_STATES:
                    return
            time.sleep(LOOK_AGAIN_S)
            changed.wait(POLL_S)
    finally:
        over.set()


def _listen(ferry: "FerryClient", rollout: str, changed: threading.Event, over: threading.Event) -> None:
    """Set `changed` at every event; without a stream do nothing, for there is the poll."""
    while not over.is_set():
        with contextlib.suppress(FerryError):
            for _ in ferry.signals(subject=rollout):
                changed.set()
                if over.is_set():
                    return
        over.wait(POLL_S)


def _print_lines(ferry: "FerryClient", output: Output, rollout: str) -> "RolloutView":
    last = ""
    for view in views(ferry, rollout):
        line = msgspec.json.encode(view).decode() if output.form == "json" else summary(view)
        if line != last:
            click.echo(line)
            last = line
    return view


def summary(view: "RolloutView") -> str:
    """A rollout in one line."""
    phase = next((one for one in view.phases if one.state is not PhaseState.PASSED), view.phases[-1])
    counts = ", ".join(f"{number} {state.value}" for state, number in view.counts.items())
    where = f"phase {phase.index + 1}/{len(view.phases)} ({reach_of(phase.spec)}) {phase.state.value}"
    reason = f"; {view.reason}" if view.reason else ""
    return f"{view.id} {view.release} {view.state.value}: {where}; {counts}{reason}"


def _draw(ferry: "FerryClient", rollout: str) -> "RolloutView":
    from rich.live import Live

    with Live(refresh_per_second=4) as live:
        for view in views(ferry, rollout):
            live.update(picture(view), refresh=True)
    return view


def picture(view: "RolloutView") -> "RenderableType":
    """A rollout as a table with a bar per phase."""
    from rich.markup import escape
    from rich.table import Table

    reason = f"\n{escape(view.reason)}" if view.reason else ""
    title = f"{view.release}  {view.id}  [bold]{view.state.value}[/bold]{reason}"
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False)
    headings, *rows = phase_rows(view)
    for heading in (*headings[:3], "PROGRESS", *headings[3:]):
        drawn.add_column(heading, min_width=BAR_CELLS if heading == "PROGRESS" else None)
    for phase, row in zip(view.phases, rows, strict=True):
        cells = [escape(cell) for cell in row]
        drawn.add_row(*cells[:3], _bar(phase), *cells[3:])
    return drawn


def _bar(phase: "PhaseView") -> str:
    good, bad = (phase.counts.get(state, 0) for state in (ExecutionState.SUCCEEDED, ExecutionState.FAILED))
    cells = BAR_CELLS / phase.devices if phase.devices else 0
    green, red = round(good * cells), round(bad * cells)
    rest = BAR_CELLS - green - red
    return f"[green]{'━' * green}[/green][red]{'━' * red}[/red][dim]{'━' * rest}[/dim]"
