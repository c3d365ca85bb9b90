"""Which controller a command speaks to, and as whom: flags, then variables, then the chosen context, then defaults.

Contexts live in one JSON file that only its owner can read, because they may hold tokens.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from common.durable import PRIVATE_MODE, write_file
from common.errors import InvalidInput, NotFound
from controller.cli.output import FORMATS, Output

if TYPE_CHECKING:
    from controller.client import FerryClient

R = TypeVar("R")

DEFAULT_URL = "http://127.0.0.1:8480"
CONTEXT_FILE_BYTES_MAX = 1024 * 1024
OPTIONS = ("context", "url", "token", "token_file", "output")


class Context(msgspec.Struct, frozen=True, omit_defaults=True):
    """A remembered controller."""

    url: str
    token: str = ""
    token_file: str = ""


class Contexts(msgspec.Struct, frozen=True):
    """What the file holds."""

    current: str = ""
    contexts: dict[str, Context] = {}


def connected(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command the connection and output options, and call it with a client and an `Output` first."""

    @click.option("--context", metavar="NAME", help="Use this remembered controller.")
    @click.option("--url", metavar="URL", help="The controller's URL.")
    @click.option("--token", metavar="TOKEN", help="The token to use; --token-file and FERRY_TOKEN are safer.")
    @click.option("--token-file", metavar="FILE", help="A file that holds the token.")
    @click.option("-o", "--output", type=click.Choice(FORMATS), help="How to show results (default: table).")
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> R:
        options = {name: kwargs.pop(name) for name in OPTIONS}
        with_root = {**_root_options(), **{name: value for name, value in options.items() if value is not None}}
        output = Output(with_root.pop("output", "table"))
        with client_of(**with_root) as ferry:
            return command(ferry, output, *args, **kwargs)

    return run


def client_of(
    context: str | None = None, url: str | None = None, token: str | None = None, token_file: str | None = None
) -> "FerryClient":
    """The client that these flags, the environment and the context file add up to."""
    from controller.client import FerryClient

    chosen = _chosen(context or os.environ.get("FERRY_CONTEXT", ""))
    secret = (
        token
        or _read_token(token_file)
        or os.environ.get("FERRY_TOKEN", "")
        or _read_token(os.environ.get("FERRY_TOKEN_FILE"))
        or chosen.token
        or _read_token(chosen.token_file)
    )
    where = url or os.environ.get("FERRY_URL") or chosen.url
    if not where.startswith(("http://", "https://")):
        raise InvalidInput(f"{where!r} is not a URL", field="url", fix="use http://HOST:PORT or https://HOST")
    return FerryClient(where, secret)


def contexts_path() -> Path:
    """Where contexts are kept: FERRY_CONTEXTS, else below the user's configuration folder (XDG base directories)."""
    named = os.environ.get("FERRY_CONTEXTS")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "edgeferry" / "contexts.json"


def load_contexts() -> Contexts:
    """The remembered controllers; none if there is no file yet."""
    path = contexts_path()
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(CONTEXT_FILE_BYTES_MAX), type=Contexts)
    except FileNotFoundError:
        return Contexts()
    except msgspec.DecodeError as error:
        raise InvalidInput(f"{path} is damaged: {error}", fix="mend or remove it, then: ferry context set") from error


def save_contexts(contexts: Contexts) -> None:
    """Remember them, for the owner's eyes only."""
    path = contexts_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_file(path, msgspec.json.format(msgspec.json.encode(contexts), indent=2) + b"\n", PRIVATE_MODE)


def _chosen(name: str) -> Context:
    remembered = load_contexts()
    wanted = name or remembered.current
    if not wanted:
        return Context(DEFAULT_URL)
    found = remembered.contexts.get(wanted)
    if found is None:
        raise NotFound(f"there is no context {wanted!r}", field="context", fix="see: ferry context list")
    return found


def _root_options() -> dict[str, str]:
    params = click.get_current_context().find_root().params
    return {name: params[name] for name in OPTIONS if params.get(name) is not None}


def _read_token(file: str | None) -> str:
    if not file:
        return ""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InvalidInput(f"cannot read {file}: {reason}", field="token-file") from error
