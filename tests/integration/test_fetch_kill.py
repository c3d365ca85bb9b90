"""A download whose process is killed goes on in the next one."""

import asyncio
import random
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import msgspec

from common.artifact import ArtifactRef
from edge_agent.fetch import Transfer
from edge_agent.fetch.http import BLOCK_BYTES
from edge_agent.fetch.partial import partial_path
from tests.blob_server import BlobServer
from tests.conftest import eventually

DATA = random.Random(3).randbytes(8_000_000)
RATE = 2_000_000


async def child(server: BlobServer, ref: ArtifactRef, destination: Path, rate: int) -> Process:
    module = "tests.integration.downloader"
    arguments = (server.url, ref.digest, str(ref.size), str(destination), str(rate))
    return await asyncio.create_subprocess_exec(sys.executable, "-m", module, *arguments, stdout=PIPE)


async def test_after_a_kill_at_most_one_block_is_fetched_twice(tmp_path: Path) -> None:
    async with BlobServer() as server:
        ref, destination = server.add(DATA), tmp_path / "model"
        partial = partial_path(ref, destination)
        first = await child(server, ref, destination, RATE)
        await eventually(lambda: partial.exists() and partial.stat().st_size > 2 * BLOCK_BYTES, "two blocks")
        first.kill()
        await first.wait()
        kept = partial.stat().st_size
        second = await child(server, ref, destination, 0)
        output, _ = await second.communicate()

    transfer = msgspec.json.decode(output, type=Transfer)
    assert server.ranges == ["", f"bytes={kept}-"]
    assert kept > 2 * BLOCK_BYTES
    assert (transfer.resumed_bytes, transfer.bytes) == (kept, len(DATA) - kept)
    assert destination.read_bytes() == DATA
    assert not partial.exists()
