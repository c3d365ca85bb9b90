"""A child process that downloads one artifact: `python -m tests.integration.downloader URL DIGEST SIZE FILE RATE`."""

import asyncio
import sys
from pathlib import Path

import msgspec

from common.artifact import ArtifactRef
from common.clock import SystemClock
from common.ids import parse_digest
from edge_agent.fetch import FetchLimits, Transfer, make_fetcher, open_session
from tests.blob_server import TOKEN


async def download(url: str, ref: ArtifactRef, destination: Path, rate: int) -> Transfer:
    async with open_session(TOKEN) as session:
        fetcher = make_fetcher(url, session, None, FetchLimits(rate_bytes_per_s=rate), SystemClock())
        return await fetcher.fetch(ref, destination)


if __name__ == "__main__":
    url, digest, size, destination, rate = sys.argv[1:]
    transfer = asyncio.run(
        download(url, ArtifactRef(parse_digest(digest), int(size)), Path(destination), int(rate)),
    )
    sys.stdout.write(msgspec.json.encode(transfer).decode())
