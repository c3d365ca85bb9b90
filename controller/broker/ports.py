"""Ports that stay: "any free port" is chosen once and kept, because devices remember where they were told to call."""

import contextlib
import errno
import secrets
import socket
from pathlib import Path

from common import durable
from common.errors import InvalidInput

QUIET_PORTS = range(20_000, 32_768)
"""Below the ports that Linux gives to outgoing connections (`ip_local_port_range`): one of those could be taken between
our choosing and our listening, or between two starts of a controller.
"""
ATTEMPTS_MAX = 100


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
    """A TCP port on `host` that nobody listens on, and that no outgoing connection will take before we do.

    Raises `InvalidInput` for `field` when `host` is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(ATTEMPTS_MAX):
        port = secrets.choice(QUIET_PORTS)
        try:
            with socket.socket(family) as probe:
                probe.bind((host, port))
                return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                fix = "give an address of this machine and a port, for example 127.0.0.1:1883"
                raise InvalidInput(f"cannot listen on {host!r}: {error.strerror}", field=field, fix=fix) from error
    raise InvalidInput(f"found no free port on {host!r}", field=field, fix="name one that is free")
