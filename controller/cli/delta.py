"""`ferry delta`: make, apply and inspect patches between files on this machine. Talks to no controller.

A result appears under its name only when it is complete and on the disk; a failure or Ctrl-C leaves nothing behind.
Reports and progress go to stderr, what `inspect` finds to stdout.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.durable import replacing
from common.errors import InvalidInput
from common.filesource import FileSource

if TYPE_CHECKING:
    from common.delta import PatchSummary

INPUT = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)

Report = Callable[[int, int], object]


@click.group("delta", short_help="Make, apply and inspect patches between files.")
def delta() -> None:
    """Make, apply and inspect patches between files on this machine."""


@delta.command("make", short_help="Write a patch that turns OLD into NEW.")
@click.argument("old", type=INPUT)
@click.argument("new", type=INPUT)
@click.option("-o", "--output", "patch", type=OUTPUT, required=True, metavar="PATCH", help="Where to write the patch.")
def make(old: Path, new: Path, patch: Path) -> None:
    """Write a patch that turns OLD into NEW.

    A device that has OLD rebuilds NEW from the patch, bit for bit.
    """
    from common import delta as codec

    with (
        FileSource(old) as base,
        FileSource(new) as target,
        _progress("making the patch") as report,
        _new_file(patch) as sink,
    ):
        summary = codec.make(base, target, sink, progress=report)
    click.echo(f"{patch}: {summary.patch_bytes} bytes{_share(summary)}", err=True)


@delta.command("apply", short_help="Rebuild the new file from OLD and PATCH.")
@click.argument("old", type=INPUT)
@click.argument("patch", type=INPUT)
@click.option("-o", "--output", "new", type=OUTPUT, required=True, metavar="NEW", help="Where to write the new file.")
def apply(old: Path, patch: Path, new: Path) -> None:
    """Rebuild the new file from OLD and PATCH, and check it against the digest in the patch."""
    from common import delta as codec

    with FileSource(old) as base, FileSource(patch) as source, _progress("applying the patch") as report:
        target = codec.inspect(source).target
        with _new_file(new) as sink:
            codec.apply(base, source, _counting(sink, target.size, report), target=target)
    click.echo(f"{new}: {target.size} bytes, {target.digest}", err=True)


@delta.command("inspect", short_help="Show what PATCH is for and made of.")
@click.argument("patch", type=INPUT)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def inspect(patch: Path, form: str) -> None:
    """Show which file PATCH starts from, which it makes, and out of what. Its bytes are proven only by applying it."""
    from common import delta as codec

    with FileSource(patch) as source:
        summary = codec.inspect(source)
    if form == "json":
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(summary), indent=2))
    else:
        _print_table(summary)


def _print_table(summary: "PatchSummary") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    console.print(f"codec   {summary.codec}", highlight=False)
    console.print(f"base    {summary.base.digest}  {summary.base.size} bytes", highlight=False)
    console.print(f"target  {summary.target.digest}  {summary.target.size} bytes", highlight=False)
    console.print(f"patch   {summary.patch_bytes} bytes{_share(summary)}", highlight=False)
    table = Table("operation", box=None)
    for heading in ("count", "bytes of the target", "bytes in the patch"):
        table.add_column(heading, justify="right")
    for kind in summary.operations:
        table.add_row(kind.kind, str(kind.count), str(kind.output_bytes), str(kind.patch_bytes))
    console.print(table)


def _share(summary: "PatchSummary") -> str:
    if not summary.target.size:
        return ""
    return f", {100 * summary.patch_bytes / summary.target.size:.2f} % of the new file's {summary.target.size}"


def _counting(sink: Callable[[bytes], object], total: int, report: Report | None) -> Callable[[bytes], object]:
    """`sink`, reporting how many of `total` bytes went through."""
    if report is None:
        return sink
    done = 0

    def count(data: bytes) -> None:
        nonlocal done
        sink(data)
        done += len(data)
        report(done, total)

    return count


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Report | None]:
    """A progress bar on stderr; None where nobody would see it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Callable[[bytes], object]]:
    """A sink whose bytes become the file `path` when the block ends well, and are gone otherwise."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(replacing(path))
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            fix = "name a folder that exists and that you may write to"
            raise InvalidInput(f"cannot write {path}: {error.strerror}", field="output", fix=fix) from error
        yield file.write
