"""`ferry-agent`: join a fleet, run, look at what runs, and say what is wrong.

Messages go to stderr, results to stdout. The exit status is 0 when it went well, 1 when it did not (one sentence says
what, and what to do), 2 for a command line or a setting that cannot be.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import msgspec

from common.errors import FerryError, InvalidInput
from edge_agent.config import SYSTEM_DATA, AgentSettings, all_settings, load_settings

if TYPE_CHECKING:
    from edge_agent.identity import Identity

EXIT_FAILURE = 1
EXIT_USAGE = 2
EVERYWHERE = ("data", "ca_file", "log_level")
"""The settings that are flags of every command; `run` takes them all."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (by default the program's own) name; returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        settings = load_settings(vars(options), os.environ, options.config)
    except InvalidInput as error:
        return _fail(error, EXIT_USAGE)
    from edge_agent.running import become_owner

    become_owner(settings.data)
    try:
        status: int = options.command(options, settings)
    except FerryError as error:
        return _fail(error, EXIT_FAILURE)
    return status


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="ferry-agent", description="Runs models on this device, as its fleet says.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    join = commands.add_parser("join", allow_abbrev=False, help="make this device a member of a fleet")
    join.add_argument("join_string", metavar="JOIN_STRING", help="the line that `ferry device token create` printed")
    join.add_argument("--name", help="the device's id (default: the controller chooses one)")
    join.add_argument(
        "--label", metavar="K=V", action="append", default=[], type=_label, help="a fact for selectors; may be repeated"
    )
    join.add_argument("--force", action="store_true", help="leave the fleet that this device is in")
    run = commands.add_parser("run", allow_abbrev=False, help="run until SIGTERM or SIGINT")
    run.add_argument(
        "--ready-file",
        metavar="PATH",
        type=Path,
        help="write {device, pid, inference_url, started_at} as JSON here once the agent serves; removed at the end",
    )
    status = commands.add_parser("status", allow_abbrev=False, help="show what this device runs")
    status.add_argument("-o", "--output", choices=("table", "json"), default="table", help="how (default: table)")
    doctor = commands.add_parser("doctor", allow_abbrev=False, help="say what is wrong here and what to do")
    doctor.add_argument("-o", "--output", choices=("table", "json"), default="table", help="how (default: table)")
    plugin = commands.add_parser("plugin", allow_abbrev=False, help="the plug-ins that steps of a release can name")
    actions = plugin.add_subparsers(title="commands", required=True, metavar="COMMAND")
    listing = actions.add_parser(
        "list", allow_abbrev=False, help="list those that are installed, and the built-in ones"
    )
    digest = actions.add_parser("digest", allow_abbrev=False, help="print the digest of a plug-in's code")
    digest.add_argument("plugin", metavar="NAME", help="the name of its entry point")
    of_plugins = ((listing, _plugin_list), (digest, _plugin_digest))
    for command, function in ((join, _join), (run, _run), (status, _status), (doctor, _doctor), *of_plugins):
        command.set_defaults(command=function)
        command.add_argument("--config", metavar="FILE", default="", help="settings in TOML (default: DATA/agent.toml)")
        _add_settings(command, everything=command is run)
    return parser


class _Version(argparse.Action):
    """`--version`, which looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        _say(f"ferry-agent {version('edgeferry')}", sys.stdout)
        parser.exit()


def _add_settings(command: argparse.ArgumentParser, *, everything: bool) -> None:
    for setting in all_settings():
        if everything or setting.name in EVERYWHERE:
            text = setting.description.replace("%", "%%").replace("`", "")
            command.add_argument(setting.flag, metavar="VALUE", help=text)


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _join(options: argparse.Namespace, settings: AgentSettings) -> int:
    from edge_agent.enrol import join
    from edge_agent.machine import capabilities
    from edge_agent.running import sole_user

    with sole_user(settings.data):
        identity = asyncio.run(
            join(
                options.join_string,
                settings.data,
                capabilities=capabilities(settings),
                name=options.name,
                labels=dict(options.label),
                force=options.force,
                ca_file=settings.ca_file,
            )
        )
    start = "systemctl start ferry-agent" if settings.data == SYSTEM_DATA else "ferry-agent run"
    _say(f"joined {identity.controller_url} as {identity.device}; start it with `{start}`", sys.stderr)
    _say(identity.device, sys.stdout)
    return 0


def _run(options: argparse.Namespace, settings: AgentSettings) -> int:
    from common.observability import otlp_endpoint, setup_logging, setup_tracing
    from edge_agent.identity import load_identity
    from edge_agent.running import sole_user

    identity = load_identity(settings.data)
    with sole_user(settings.data):
        setup_logging(settings.log_level)
        with contextlib.ExitStack() as ending:
            if endpoint := otlp_endpoint(settings.otlp_endpoint):  # without one, traces are passed on and none is made
                ending.callback(setup_tracing("ferry-agent", identity.device, endpoint).shutdown)
            asyncio.run(_serve(settings, identity, options.ready_file))
    return 0


async def _serve(settings: AgentSettings, identity: "Identity", ready_file: Path | None) -> None:
    """Run the agent until it is told to stop, and let a service manager know how it is."""
    with _nothing_collected():
        from common.clock import SystemClock
        from edge_agent.app import Agent
        from edge_agent.running import Run, announced
        from edge_agent.supervisor import Supervisor
        from edge_agent.watchdog import Watchdog, starting, status

        agent, supervisor = Agent(settings, identity), Supervisor(os.environ)
        told_to_stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, told_to_stop.set)
        async with starting(supervisor):
            await agent.start()
    watching = asyncio.create_task(Watchdog(supervisor, agent.watched, SystemClock()).watch())
    try:
        run = Run(device=identity.device, pid=os.getpid(), inference_url=agent.inference_url, started_at=time.time())
        with announced(settings.data, run, ready_file):
            supervisor.tell("READY=1", status(agent.watched.sentence()))
            _say(f"{run.device} answers at {run.inference_url}", sys.stderr)
            await told_to_stop.wait()
    finally:
        supervisor.tell("STOPPING=1", status("finishes what is under way"))
        watching.cancel()
        await agent.stop()


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """No search for garbage while the program loads, which makes none: it took a tenth of the start. Nor is what was
    loaded searched later, when each search would hold up requests.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _status(options: argparse.Namespace, settings: AgentSettings) -> int:
    from edge_agent.identity import load_identity
    from edge_agent.status import as_table, read_status

    status = asyncio.run(read_status(settings.data, load_identity(settings.data)))
    table = options.output == "table"
    _say(as_table(status) if table else _as_json(status), sys.stdout)
    return 0


def _doctor(options: argparse.Namespace, settings: AgentSettings) -> int:
    from edge_agent.doctor import as_document, as_table, examine, worst

    findings = asyncio.run(examine(settings))
    table = options.output == "table"
    _say(as_table(findings) if table else _as_json(as_document(findings)), sys.stdout)
    return EXIT_FAILURE if worst(findings) == "problem" else 0


def _plugin_list(*_: object) -> int:
    from common.pipelines.built_in import BUILT_IN
    from common.pipelines.installed import digest_of_plugin, plugins

    for name, version in sorted(BUILT_IN):
        _say(f"{name} {version} built in", sys.stdout)
    for plugin in plugins():
        try:
            code: object = digest_of_plugin(plugin)
        except FerryError as error:
            code = f"cannot be used: {error}"
        _say(f"{plugin.name} {plugin.version} {code}", sys.stdout)
    return 0


def _plugin_digest(options: argparse.Namespace, _: AgentSettings) -> int:
    from common.pipelines.installed import digest_of_plugin, find_plugin

    _say(digest_of_plugin(find_plugin(options.plugin)), sys.stdout)
    return 0


def _as_json(document: object) -> str:
    return msgspec.json.format(msgspec.json.encode(document)).decode()


def _fail(error: FerryError, status: int) -> int:
    _say(f"ferry-agent: {error}", sys.stderr)
    return status


def _say(text: str, stream: TextIO) -> None:
    stream.write(f"{text}\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
