"""A TCP proxy that misbehaves on command, between a real client and a real server.

async with FaultProxy(server_port) as proxy:
    ... talk to 127.0.0.1:proxy.port ...
    proxy.cut()                     # reset every connection now
    proxy.refuse = True             # reset every new connection
    proxy.stall = True              # take bytes, pass none on, in both directions (a half-open line)
    proxy.stall_after = 10_000      # do that of its own accord once it has brought so many bytes to clients
    proxy.truncate_after = 10_000   # close each new connection once it has brought so many bytes to the client
    proxy.delay_s = 0.05            # hold each piece back that long, in both directions
"""

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Self

PIECE_BYTES = 16 * 1024
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class FaultProxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target_port`."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.refuse = False
        self.delay_s = 0.0
        self.truncate_after: int | None = None
        self.stall_after: int | None = None
        self.connections = 0
        """Accepted so far, refused ones included."""
        self.bytes_to_client = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.stall = False
        self.cut()
        await self._server.wait_closed()

    @property
    def stall(self) -> bool:
        """Whether bytes are swallowed by the line for now; they go on when it is false again."""
        return not self._flowing.is_set()

    @stall.setter
    def stall(self, stalled: bool) -> None:
        (self._flowing.clear if stalled else self._flowing.set)()

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._open):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refuse:
            return _reset(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            return _reset(writer)
        pair = {writer, up_writer}
        self._open |= pair
        try:
            tasks = [
                asyncio.create_task(self._pump(reader, up_writer, None)),
                asyncio.create_task(self._pump(up_reader, writer, self.truncate_after)),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._open -= pair
            for end in pair:
                _reset(end)
        return None

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None) -> None:
        to_client = writer.get_extra_info("sockname")[1] == self.port
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES if left is None else min(left, PIECE_BYTES)):
                await asyncio.sleep(self.delay_s)
                await self._flowing.wait()
                writer.write(piece)
                await writer.drain()
                self.bytes_to_client += len(piece) if to_client else 0
                if self.stall_after is not None and self.bytes_to_client >= self.stall_after:
                    self.stall = True
                if left is not None:
                    left -= len(piece)
                    if left <= 0:  # not reset: that would throw away what the client has not read yet
                        writer.close()
                        await writer.wait_closed()
                        return
            writer.write_eof()
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    writer.transport.abort()
