"""Ports that stay: "any free port" is chosen once and kept, because devices remember where they were told to call."""

import contextlib
import socket
from pathlib import Path

from common import durable
from common.errors import InvalidInput


def kept_port(path: Path, host: str, field: str) -> int:
    """The port in the file at `path`, or a free one on `host`, written there before it is used.

    Raises `InvalidInput` for `field` when `host` is no address of this machine.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(path.read_text())
    port = free_port(host, field)
    durable.write_file(path, f"{port}\n".encode())
    return port


def free_port(host: str, field: str) -> int:
    """A TCP port on `host` that nobody listens on at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        fix = "give an address of this machine and a port, for example 127.0.0.1:1883"
        raise InvalidInput(f"cannot listen on {host!r}: {error.strerror}", field=field, fix=fix) from error
