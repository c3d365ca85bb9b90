"""Results on stdout: a plain table for people, JSON or YAML for programs, names for the shell.

Tables are plain aligned text, also on a terminal, so that they can be piped, and need no library. JSON and YAML show
the API's own fields, unrounded.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click
import msgspec

T = TypeVar("T")

FORMATS = ("table", "json", "yaml", "name")
KILO = 1000
UNITS = ("B", "kB", "MB", "GB", "TB")

Columns = Mapping[str, Callable[[T], str]]
"""Heading to what a row shows there."""


class Output:
    """Prints results in one of `FORMATS`."""

    def __init__(self, form: str = "table") -> None:
        self.form = form

    @property
    def is_table(self) -> bool:
        """Whether a person reads it."""
        return self.form == "table"

    def items(self, items: Iterable[T], columns: Columns[T], name: Callable[[T], str]) -> None:
        """A list."""
        match self.form:
            case "name":
                for item in items:
                    click.echo(name(item))
            case "table":
                click.echo(table([list(columns), *([cell(item) for cell in columns.values()] for item in items)]))
            case _:
                self.document(list(items))

    def item(self, item: T, columns: Columns[T], name: Callable[[T], str]) -> None:
        """One thing: a table of its fields, one a line."""
        match self.form:
            case "name":
                click.echo(name(item))
            case "table":
                click.echo(table([[heading, cell(item)] for heading, cell in columns.items()]))
            case _:
                self.document(item)

    def document(self, value: Any) -> None:
        """A whole value as JSON or YAML."""
        if self.form == "yaml":
            import yaml

            plain = msgspec.to_builtins(value, str_keys=True)
            click.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), nl=False)
        else:
            click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, two spaces between them."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))] if rows else []
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def size(number: float) -> str:
    """Bytes for people: 3.2 MB (SI units, powers of 1000)."""
    value, unit = float(number), 0
    while value >= KILO and unit < len(UNITS) - 1:
        value, unit = value / KILO, unit + 1
    return f"{value:.0f} {UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.1f} {UNITS[unit]}"


def milliseconds(seconds: float | None) -> str:
    """A short time for people: 12.3 ms."""
    return "-" if seconds is None else f"{seconds * KILO:.1f} ms"


def when(seconds: float | None) -> str:
    """A moment in local time."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def share(part: float, whole: float) -> str:
    """A part as a percentage."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def pairs(mapping: Mapping[str, object]) -> str:
    """key=value, comma-separated."""
    return ",".join(f"{key}={value}" for key, value in mapping.items()) or "-"
