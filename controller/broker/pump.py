"""Moves the bytes of a paho client on the asyncio loop, so that no thread stands between the socket and our code.

paho's own thread uses select(2), which fails for descriptors above 1023: a controller with a thousand open HTTP
connections could not reconnect. Here the loop watches the socket instead, and reading can be paused, which is how a
full queue slows the broker down. Only the blocking part of connecting (name lookup, TCP, TLS) runs in a thread. All
methods belong to the loop's thread.
"""

import asyncio
import contextlib
import socket
import ssl
from typing import Any

import paho.mqtt.client as mqtt

from common.errors import Unavailable

MISC_INTERVAL_S = 1.0
"""How often paho looks whether it is time for a ping."""


class SocketPump:
    """Drives `client`, which nobody else may drive."""

    def __init__(self, client: mqtt.Client) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._reading = True
        client.on_socket_close = self._on_close
        client.on_socket_register_write = self._on_want_write
        client.on_socket_unregister_write = self._on_written

    async def connect(self) -> None:
        """Open the connection and send CONNECT. Raises `Unavailable`."""
        opening = self._loop.run_in_executor(None, self._client.reconnect)
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait([opening])  # the client is the thread's until then
            raise
        except (OSError, ValueError) as error:  # ValueError: paho's word for a host name that cannot be
            raise Unavailable(f"cannot reach the broker: {error}") from error
        self._watch_reads()
        self._watch_writes()

    async def keep_alive(self) -> None:
        """Ping when it is time, until cancelled."""
        while True:
            await asyncio.sleep(MISC_INTERVAL_S)
            if self._client.socket() is not None:
                self._client.loop_misc()

    def pause_reading(self) -> None:
        """Leave what the broker sends in the socket."""
        self._reading = False
        self._unwatch_reads(self._client.socket())

    def resume_reading(self) -> None:
        """Take up reading again."""
        if not self._reading:
            self._reading = True
            self._watch_reads()

    @property
    def reading(self) -> bool:
        return self._reading

    def flush(self) -> None:
        """Write what can be written without waiting."""
        if self._client.socket() is not None:
            self._client.loop_write()

    def abort(self) -> None:
        """Break the connection, if there is one; paho notices it as lost."""
        sock = self._client.socket()
        if isinstance(sock, socket.socket):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            while self._client.socket() is not None:
                self._client.loop_read()

    def _watch_reads(self) -> None:
        sock = self._client.socket()
        if sock is not None and self._reading:
            self._loop.add_reader(sock.fileno(), self._read)
            self._read()  # TLS may hold decrypted bytes that no poll will announce

    def _watch_writes(self) -> None:
        sock = self._client.socket()
        if sock is not None and self._client.want_write():
            self._loop.add_writer(sock.fileno(), self._client.loop_write)

    def _read(self) -> None:
        self._client.loop_read()
        while self._reading and _decrypted(self._client.socket()):
            self._client.loop_read()

    def _unwatch_reads(self, sock: Any) -> None:
        if sock is not None and sock.fileno() >= 0:
            self._loop.remove_reader(sock.fileno())

    # Called by paho; the first also from the thread that connects.

    def _on_want_write(self, _client: mqtt.Client, _userdata: Any, _sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch_writes)

    def _on_written(self, _client: mqtt.Client, _userdata: Any, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_writer(sock.fileno())

    def _on_close(self, _client: mqtt.Client, _userdata: Any, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_reader(sock.fileno())
            self._loop.remove_writer(sock.fileno())


def _decrypted(sock: socket.socket | Any) -> bool:
    """Whether TLS has bytes ready that the kernel no longer knows of."""
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
