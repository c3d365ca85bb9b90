"""A patch builder in a process of its own, so that a test can kill it: `python -m tests.integration.builder_process F`.

It works on the store and the blobs in the folder F, as `registry_bench` makes them, and builds until it is killed.
"""

import asyncio
import sys
from pathlib import Path

from common.clock import SystemClock
from controller.registry.blobs import LocalBlobs
from controller.registry.patches import PatchBuilder
from controller.store import open_store
from tests.integration.patch_bench import PLENTY


async def main(folder: Path) -> None:
    clock = SystemClock()
    store = await open_store(f"sqlite:///{folder}/ferry.db", clock)
    await PatchBuilder(store, LocalBlobs(folder / "blobs"), clock, PLENTY).run()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
