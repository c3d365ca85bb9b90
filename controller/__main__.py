"""`ferry-controller serve`: runs a controller until it is told to stop (SIGINT, SIGTERM).

Exit status: 0 when it was told to stop, 1 when it could not start (the reason and the fix on stderr), 2 for a wrong
command line or setting. Every setting is a flag, see `controller.config`.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from common import durable
from common.errors import FerryError, InvalidInput
from controller.config import CONFIG_FILE, Settings, all_settings, load_settings

if TYPE_CHECKING:
    from controller.app import Controller

FAILED = 1
USAGE = 2


class Ready(msgspec.Struct, frozen=True):
    """What `--ready-file` holds once the controller serves."""

    url: str
    broker_url: str
    admin_token_file: str
    pid: int


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    flags = vars(_parser().parse_args(arguments))
    del flags["command"]
    ready_file, config = flags.pop("ready_file"), flags.pop("config")
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = load_settings(given, os.environ, config or "")
        import uvloop

        from common.observability import setup_logging

        setup_logging(settings.log_level)
        uvloop.run(_serve(settings, Path(ready_file) if ready_file else None))
    except FerryError as error:
        print(f"ferry-controller: {error}", file=sys.stderr)  # noqa: T201  this is a command
        sys.exit(USAGE if isinstance(error, InvalidInput) else FAILED)


async def _serve(settings: Settings, ready_file: Path | None) -> None:
    from common.observability import otlp_endpoint, setup_tracing
    from controller.app import Controller
    from controller.metrics import SERVICE

    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    tracing = setup_tracing(SERVICE, settings.data, otlp_endpoint(settings.otlp_endpoint))
    controller = Controller(settings)
    await controller.start()
    try:
        _announce(controller, ready_file)
        await stopping.wait()
    finally:
        await controller.stop()
        tracing.shutdown()


def _announce(controller: "Controller", ready_file: Path | None) -> None:
    token_file = str(controller.admin_token_file)
    print(  # noqa: T201  this is a command
        f"API     {controller.url}\nbroker  {controller.broker_url}\ntoken   {token_file}\n"
        f"try     ferry --url {controller.url} --token-file {token_file} device list",
        flush=True,
    )
    if ready_file is not None:
        ready = Ready(controller.url, controller.broker_url, token_file, os.getpid())
        durable.write_file(ready_file, msgspec.json.encode(ready))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ferry-controller", description="The controller of an Edgeferry fleet.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the controller until it is stopped")
    serve.add_argument("--config", metavar="FILE", help=f"settings as TOML (variable {CONFIG_FILE})")
    serve.add_argument("--ready-file", metavar="FILE", help="write where it listens to FILE, as JSON, once it serves")
    for setting in all_settings():
        default = f" (default: {setting.default})" if setting.default != "" else ""
        text = f"{setting.description}{default}".replace("%", "%%")
        serve.add_argument(setting.flag, dest=setting.name, metavar="VALUE", help=text)
    return parser


if __name__ == "__main__":
    main()
