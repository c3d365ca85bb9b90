"""`ferry device`: the fleet, its labels, and the claims that let new devices in."""

from typing import TYPE_CHECKING

import click

from controller.cli.connection import connected
from controller.cli.output import Output, pairs, size, table, when
from controller.cli.values import duration, parse_labels

if TYPE_CHECKING:
    from common.wire import UpdateReport
    from controller.client import FerryClient
    from controller.resources import DeviceView


@click.group("device")
def device() -> None:
    """Look at the fleet, label devices, let new ones in."""


@device.command("list")
@click.option("--selector", default="true", metavar="EXPR", help="Only devices of which this is true.")
@connected
def list_(ferry: "FerryClient", output: Output, selector: str) -> None:
    """List devices."""
    output.items(ferry.devices(selector), _COLUMNS, lambda one: one.name)


@device.command("show")
@click.argument("name", metavar="DEVICE")
@connected
def show(ferry: "FerryClient", output: Output, name: str) -> None:
    """Show a device: what it should run, what it runs, how it is."""
    view = ferry.device(name)
    output.item(view, {**_COLUMNS, **_DETAILS}, lambda one: one.name)
    if output.is_table:
        click.echo()
        click.echo(table(_model_rows(view)))
        for rows in filter(None, (_chosen_rows(view), _finding_rows(view))):
            click.echo()
            click.echo(table(rows))
        for entry in view.reported.models if view.reported else ():
            if entry.detail:
                click.echo(f"{entry.model} waits: {entry.detail}")


@device.command("label")
@click.argument("name", metavar="DEVICE")
@click.argument("labels", nargs=-1, required=True, metavar="KEY=VALUE|KEY-...")
@connected
def label(ferry: "FerryClient", output: Output, name: str, labels: tuple[str, ...]) -> None:
    """Set labels (KEY=VALUE) or remove them (KEY-)."""
    view = ferry.label_device(name, parse_labels(labels, removable=True))
    output.item(view, _COLUMNS, lambda one: one.name)


@device.group("token")
def token() -> None:
    """Claims: what lets new devices in."""


@token.command("create")
@click.option("--uses", default=1, show_default=True, help="How many devices it lets in.")
@click.option("--ttl", type=duration, default="24h", show_default=True, help="How long it is good for.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label that the devices get.")
@connected
def create(ferry: "FerryClient", output: Output, uses: int, ttl: float, labels: tuple[str, ...]) -> None:
    """Make a join string. It is a secret, and is shown this once."""
    from controller.resources import CreateJoinToken

    given = {key: value for key, value in parse_labels(labels).items() if value is not None}
    made = ferry.create_join_token(CreateJoinToken(uses=uses, ttl_s=ttl, labels=given))
    if output.is_table:
        devices = "device" if uses == 1 else "devices"
        click.echo(f"claim {made.id} lets {uses} {devices} in until {when(made.expires_at)}; on the device:", err=True)
        click.echo(f"  ferry-agent join {'JOIN_STRING'} && ferry-agent run", err=True)
        click.echo(made.join_string)
    else:
        output.item(made, {}, lambda one: one.name)


@token.command("list")
@connected
def list_tokens(ferry: "FerryClient", output: Output) -> None:
    """List claims, without their secrets."""
    columns = {
        "ID": lambda one: one.id,
        "USES LEFT": lambda one: "any" if one.uses_left is None else str(one.uses_left),
        "EXPIRES": lambda one: when(one.expires_at),
        "LABELS": lambda one: pairs(one.labels),
    }
    output.items(ferry.join_tokens(), columns, lambda one: one.name)


@token.command("withdraw")
@click.argument("claim", metavar="ID")
@connected
def withdraw(ferry: "FerryClient", output: Output, claim: str) -> None:
    """Make a claim worthless; devices that joined with it stay."""
    del output
    ferry.withdraw_join_token(claim)
    click.echo(f"claim {claim} is withdrawn", err=True)


_COLUMNS = {
    "DEVICE": lambda one: one.name,
    "PRESENCE": lambda one: one.presence.value,
    "SYNC": lambda one: "yes" if one.in_sync else "no",
    "RUNNING": lambda one: ",".join(_running(one)) or "-",
    "LABELS": lambda one: pairs(one.labels),
    "LAST SEEN": lambda one: when(one.last_seen),
}
_DETAILS = {
    "JOINED": lambda one: when(one.created_at),
    "GENERATION": lambda one: str(one.generation),
    "AGENT": lambda one: one.capabilities.agent_version if one.capabilities else "-",
    "MACHINE": lambda one: (
        f"{one.capabilities.machine}, {one.capabilities.cpu_count} CPUs" if one.capabilities else "-"
    ),
    "CLASS": lambda one: (one.capabilities.device_class or "-") if one.capabilities else "-",
    "INFERENCE": lambda one: one.capabilities.inference_url if one.capabilities else "-",
    "CPU": lambda one: f"{one.heartbeat.cpu_percent:.0f} %" if one.heartbeat else "-",
    "304 ANSWERS": lambda one: str(one.heartbeat.not_modified) if one.heartbeat else "-",
}


def _running(view: "DeviceView") -> list[str]:
    models = view.reported.models if view.reported else ()
    return [f"{entry.model}@{entry.running}" for entry in models if entry.running]


def _model_rows(view: "DeviceView") -> list[list[str]]:
    rows = [["MODEL", "ASSIGNED", "RUNNING", "PHASE", "LAST UPDATE"]]
    reported = {entry.model: entry for entry in view.reported.models} if view.reported else {}
    for model in sorted({*view.assigned, *reported}):
        entry = reported.get(model)
        update = entry.last_update if entry else None
        ended = _ended(update) if update else "-"
        running, phase = (entry.running or "-", entry.phase) if entry else ("-", "-")
        rows.append([model, view.assigned.get(model, "-"), running, phase, ended])
    return rows


def _ended(update: "UpdateReport") -> str:
    """How an update ended and what it cost."""
    why = update.detail or update.reason
    over = f" over {update.transport}" if update.transport != "none" else ""
    cost = f"{update.strategy}, {size(update.bytes_transferred)}{over}"
    return f"{update.version} {update.outcome}{f': {why}' if why else ''} ({cost})"


def _chosen_rows(view: "DeviceView") -> list[list[str]]:
    """The variants that measurement has decided, and why."""
    rows = [[f"{model}@{one.version}", one.variant, one.because] for model, one in sorted(view.chosen.items())]
    return [["RELEASE", "VARIANT", "WHY"], *rows] if rows else []


def _finding_rows(view: "DeviceView") -> list[list[str]]:
    """What was found on live requests, by the update under way or the last one; nothing where none looked."""
    from controller.rollouts.findings import shadow_in_words, split_in_words

    rows = []
    for entry in view.reported.models if view.reported else ():
        update = entry.last_update
        if entry.shadow:
            rows.append([entry.model, f"{entry.target}: {shadow_in_words(entry.shadow)}"])
        if update and update.shadow:
            rows.append([entry.model, f"{update.version}: {shadow_in_words(update.shadow)}"])
        if update and update.split:
            rows.append([entry.model, f"{update.version}: {split_in_words(update.split)}"])
    return [["MODEL", "FOUND ON LIVE REQUESTS"], *rows] if rows else []
