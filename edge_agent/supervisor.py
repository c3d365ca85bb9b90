"""Telling a service manager how we are, in the words of sd_notify(3): one datagram to the socket in NOTIFY_SOCKET.

It knows the protocol and nothing of the agent. Without the variable nobody listens, and telling does nothing: the same
program runs under systemd, under podman (`--sdnotify=container`), or by hand. A manager that does not take a message is
no reason to stop: the next one comes soon.

    supervisor = Supervisor(os.environ)
    supervisor.tell("READY=1", "STATUS=serves 2 models")
"""

import logging
import os
import socket
from collections.abc import Mapping

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 1.0
MESSAGE_BYTES_MAX = 4096
"""A service manager takes no longer message; what is over it is cut off."""


class Supervisor:
    """Whoever started us and wants to hear from us, if anybody."""

    def __init__(self, environment: Mapping[str, str], pid: int | None = None) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._watchdog_s = _watchdog_s(environment, pid or os.getpid())

    @property
    def listens(self) -> bool:
        """Whether there is anybody to tell."""
        return self._address is not None

    @property
    def watchdog_s(self) -> float | None:
        """Seconds within which `WATCHDOG=1` must be told again and again once we are ready; None: nobody watches."""
        return self._watchdog_s if self.listens else None

    def tell(self, *assignments: str) -> None:
        """Send `NAME=value` lines in one message."""
        if self._address is None:
            return
        message = "\n".join(assignments).encode()[:MESSAGE_BYTES_MAX]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
                line.settimeout(SEND_TIMEOUT_S)
                line.sendto(message, self._address)
        except OSError as error:
            logger.debug("the service manager does not listen: %s", error)


def _address(variable: str) -> str | None:
    """The socket's address: a path, or a name in the abstract name space, which is written with an `@`."""
    if variable.startswith("@"):
        return "\0" + variable[1:]
    return variable if variable.startswith("/") else None


def _watchdog_s(environment: Mapping[str, str], pid: int) -> float | None:
    """As sd_watchdog_enabled(3): the time is meant for the process that WATCHDOG_PID names, if it names one."""
    if environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    microseconds = environment.get("WATCHDOG_USEC", "")
    usable = microseconds.isascii() and microseconds.isdigit() and int(microseconds) > 0
    return int(microseconds) / 1e6 if usable else None
