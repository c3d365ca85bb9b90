"""The root command: global options, subcommands imported when used, errors turned into messages and exit codes."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from common.errors import (
    Conflict,
    FerryError,
    InvalidInput,
    NotFound,
    PreconditionFailed,
    Unavailable,
)

EXIT_OF: Mapping[type[FerryError], int] = {
    InvalidInput: 2,
    NotFound: 3,
    Conflict: 4,
    PreconditionFailed: 4,
    Unavailable: 5,
    FerryError: 1,
}
"""Exit codes by kind of error: the nearest class counts. They are part of the interface (docs/reference/cli.md)."""


class Place(NamedTuple):
    """Where a subcommand lives, and its line in the help, so that nothing is imported to print it."""

    module: str
    name: str
    help: str


COMMANDS: Mapping[str, Place] = {
    "release": Place("controller.cli.release", "release", "Publish, list, show and compare releases."),
    "device": Place("controller.cli.device", "device", "Look at the fleet, label devices, let new ones in."),
    "rollout": Place("controller.cli.rollout", "rollout", "Bring a release to the fleet step by step."),
    "event": Place("controller.cli.event", "event", "Watch what happens."),
    "audit": Place("controller.cli.event", "audit", "See who did what."),
    "context": Place("controller.cli.context", "context", "Remember controllers and tokens by name."),
    "delta": Place("controller.cli.delta", "delta", "Make, apply and inspect patches between files."),
    "demo": Place("controller.cli.demo", "demo", "Run everything on this machine, on a real model."),
    "health": Place("controller.cli.event", "health", "Ask the controller how it is."),
}


class LazyGroup(click.Group):
    """A group that knows its subcommands by name and imports them when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        try:
            command: click.Command = getattr(importlib.import_module(place.module), place.name)
        except ModuleNotFoundError as error:
            missing = f"{cmd_name} needs the Python module {error.name}, which is not installed"
            raise click.UsageError(f"{missing} (pip install 'edgeferry[controller,agent,demo]')", ctx) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.help) for name, place in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FerryError as error:
            explain(error)
            ctx.exit(exit_code_of(error))


def explain(error: FerryError) -> None:
    """What went wrong, where, and what to do, on stderr."""
    where = f"{error.field}: " if error.field else ""
    click.echo(f"error: {where}{error.message}", err=True)
    if error.fix:
        click.echo(f"  fix: {error.fix}", err=True)


def exit_code_of(error: FerryError) -> int:
    """The exit code for `error`."""
    return next(EXIT_OF[kind] for kind in type(error).__mro__ if kind in EXIT_OF)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--context", metavar="NAME", help="Use this remembered controller.")
@click.option("--url", metavar="URL", help="The controller's URL.")
@click.option("--token", metavar="TOKEN", help="The token to use; --token-file and FERRY_TOKEN are safer.")
@click.option("--token-file", metavar="FILE", help="A file that holds the token.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml", "name"]), help="How to show results.")
@click.version_option(package_name="edgeferry")
def cli(**_: str | None) -> None:
    """Manage a fleet of devices that run machine-learning models.

    The options may stand here or after the subcommand. Without them FERRY_URL, FERRY_TOKEN (or FERRY_TOKEN_FILE) and
    FERRY_CONTEXT count, then the current context (`ferry context use`), then http://127.0.0.1:8480.
    """


def main() -> None:
    """The console script."""
    cli(prog_name="ferry")
