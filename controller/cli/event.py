"""`ferry event`, `ferry audit`, `ferry health`: what happens, who did what, how the controller is."""

import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from common.errors import Unavailable
from controller.cli.connection import connected
from controller.cli.output import Output, pairs, table, when

if TYPE_CHECKING:
    from controller.client import FerryClient
    from controller.store.port import Event

RECONNECT_S = 2.0
AUDIT_ENTRIES = 50


@click.group("event")
def event() -> None:
    """Watch what happens."""


@event.command("watch")
@click.option("--kind", default="", metavar="KIND", help="Only this kind, or family: `rollout` means every rollout.*.")
@click.option("--subject", default="", metavar="NAME", help="Only about this device, rollout or release.")
@click.option("--after", type=int, metavar="SEQ", help="Begin after this event number instead of now.")
@click.option("--count", type=int, metavar="N", help="Stop after this many.")
@connected
def watch(
    ferry: "FerryClient", output: Output, *, kind: str, subject: str, after: int | None, count: int | None
) -> None:
    """Print events as they happen, until interrupted; -o json prints one JSON object a line."""
    for one in itertools.islice(_following(ferry, kind, subject, after), count):
        match output.form:
            case "table":
                click.echo(f"{one.seq:>8}  {when(one.at)}  {one.kind:<22}  {one.subject}  {pairs(one.data)}")
            case "name":
                click.echo(str(one.seq))
            case "json":
                click.echo(msgspec.json.encode(one))
            case _:
                click.echo("---")
                output.document(one)


@click.group("audit")
def audit() -> None:
    """See who did what."""


@audit.command("list")
@click.option("--limit", default=AUDIT_ENTRIES, show_default=True, help="How many entries.")
@connected
def list_audit(ferry: "FerryClient", output: Output, limit: int) -> None:
    """List audit entries, newest first."""
    columns = {
        "SEQ": lambda one: str(one.seq),
        "TIME": lambda one: when(one.at),
        "ACTOR": lambda one: one.actor,
        "ACTION": lambda one: one.action,
        "SUBJECT": lambda one: one.subject,
        "DETAIL": lambda one: pairs(one.detail),
    }
    output.items(itertools.islice(ferry.audit(), limit), columns, lambda one: str(one.seq))


@click.command("health")
@connected
def health(ferry: "FerryClient", output: Output) -> None:
    """Ask the controller how it is."""
    view = ferry.health()
    if output.is_table:
        click.echo(table([["controller", f"{view.status}, version {view.version}"], *map(list, view.parts.items())]))
    else:
        output.item(view, {}, lambda one: one.status)


def _following(ferry: "FerryClient", kind: str, subject: str, after: int | None) -> Iterator["Event"]:
    """Events without end: when the stream breaks, a new one goes on after the last event seen."""
    connected_before = False
    while True:
        try:
            for signal in ferry.signals(kind=kind, subject=subject, after=after):
                connected_before = True
                if signal is not None:
                    after = signal.seq
                    yield signal
        except Unavailable as error:
            if not connected_before:
                raise
            click.echo(f"{error.message}; connecting again", err=True)
            time.sleep(RECONNECT_S)
