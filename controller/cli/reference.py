"""The list of commands for docs/reference/cli.md, made from the commands themselves; a test keeps the page true."""

from collections.abc import Iterator

import click

from controller.cli.root import cli

COMMON = frozenset({"context", "url", "token_file", "help"})
"""Options that every command has; the page describes them once."""


def listing() -> str:
    """Every command with its arguments and own options, as Markdown."""
    return "\n\n".join(_section(path, command) for path, command in commands())


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that can be run, by the words that run it."""
    yield from _below("ferry", cli, click.Context(cli, info_name="ferry"))


def _below(path: str, command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        if child is not None and not child.hidden:
            yield from _below(f"{path} {name}", child, context)


def _section(path: str, command: click.Command) -> str:
    arguments = " ".join(parameter.make_metavar(_context(command)) for parameter in _arguments(command))
    usage = f"{path} {arguments}".strip()
    return "\n".join([f"### `{usage}`", "", command.get_short_help_str(limit=200), *_options(command)])


def _arguments(command: click.Command) -> list[click.Parameter]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Argument)]


def _options(command: click.Command) -> list[str]:
    speaks_to_controller = any(parameter.name == "token_file" for parameter in command.params)
    common = COMMON | {"token", "output"} if speaks_to_controller else {"help"}
    records = [
        record
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name not in common
        if (record := parameter.get_help_record(_context(command))) is not None
    ]
    return (
        ["", "| Option | |", "| --- | --- |", *(f"| `{_cell(name)}` | {_cell(text)} |" for name, text in records)]
        if (records)
        else []
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _context(command: click.Command) -> click.Context:
    return click.Context(command)
