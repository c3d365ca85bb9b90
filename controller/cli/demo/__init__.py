"""`ferry demo`: a controller, five agents and a story on this machine, every figure measured.

The command itself is light; the story (numpy, onnx, rich) is imported when it is told.
"""

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from common.errors import FerryError, NotFound

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from controller.cli.demo.figures import Figures
    from controller.cli.demo.fleet import Endpoint, Fleet
    from controller.cli.demo.story import Watcher

EXIT_NOT_HELD = 1
EXIT_TERMINATED = 128 + signal.SIGTERM


@click.command()
@click.option(
    "--models",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".demo/models"),
    show_default=True,
    help="Folder with the two unpacked magika wheels (`make demo` fetches them).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on stdout.")
@click.option("--keep", is_flag=True, help="Leave everything running, and print the URLs and commands to try.")
def demo(models: Path, as_json: bool, keep: bool) -> None:
    """Tell the whole story on this machine: five devices, four releases, one of them bad.

    Everything is real and runs on free ports of 127.0.0.1. The exit status is 0 only if every promise held.
    """
    from rich.console import Console

    console = Console(stderr=as_json)
    try:
        figures = _tell(models, console, keep, as_json)
    except FerryError as error:
        raise click.ClickException(str(error)) from error
    sys.exit(0 if figures.held else EXIT_NOT_HELD)


def _tell(models: Path, console: "Console", keep: bool, as_json: bool) -> "Figures":
    try:
        from controller.cli.demo.story import Story
    except ImportError as error:
        fix = 'pip install "edgeferry[demo]"'
        raise NotFound(f"the demo needs a package that is not installed: {error.name}", fix=fix) from error
    with _fleet(console, keep) as fleet:
        with console.status("starting the controller") as status:
            endpoint = fleet.start_controller()
            figures = Story(fleet, endpoint, models, _watcher(console, status)).run()
        _show(figures, console, as_json)
        if keep:
            _print_what_to_try(fleet, endpoint, console)
        return figures


@contextlib.contextmanager
def _fleet(console: "Console", keep: bool) -> "Iterator[Fleet]":
    """The machines below a new folder; afterwards both are gone, unless they are to be kept or something broke."""
    from controller.cli.demo.fleet import Fleet
    from controller.cli.demo.story import DEVICES, SLOW_BYTES_PER_S, SLOW_DEVICE

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # an exception, so that what follows cleans up
    folder = Path(tempfile.mkdtemp(prefix="ferry-demo-"))
    fleet = Fleet(folder, DEVICES, SLOW_DEVICE, SLOW_BYTES_PER_S)
    try:
        yield fleet
    except BaseException as error:
        fleet.stop()
        if isinstance(error, FerryError):
            console.print(f"The logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if not keep:
        fleet.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _watcher(console: "Console", status: "Status") -> "Watcher":
    from controller.cli.demo.story import Watcher

    def chapter(text: str) -> None:
        console.print(f"[bold]{text}[/bold]", highlight=False)

    def progress(text: str) -> None:
        status.update(text)

    return Watcher(chapter, progress)


def _show(figures: "Figures", console: "Console", as_json: bool) -> None:
    from controller.cli.demo.figures import expectations_table, releases_table

    console.print()
    console.print(releases_table(figures))
    console.print()
    console.print(expectations_table(figures))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(figures)))


def _print_what_to_try(fleet: "Fleet", endpoint: "Endpoint", console: "Console") -> None:
    pids = fleet.pids()
    lines = [
        "Everything is still running. In another terminal:",
        f"  export FERRY_URL={endpoint.url} FERRY_TOKEN=$(cat {endpoint.token_file})",
        "  ferry device list; ferry rollout list; ferry release list",
        f"  curl -s {endpoint.url}/metrics",
        *(f"  curl -s {url}/v2/models/content-type   # {device}" for device, url in fleet.urls.items()),
        f"Logs and data: {fleet.folder}",
        f"To end it: kill {' '.join(str(pid) for pid in pids.values())} && rm -r {fleet.folder}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
