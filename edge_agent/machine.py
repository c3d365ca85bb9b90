"""What this machine is: the facts that a device tells its controller when it joins and when it connects.

Facts only, asked of the operating system; how busy the machine is at a moment is a heartbeat's business.
"""

import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from uuid import UUID

import psutil

from common.delta import CODECS
from common.wire import Capabilities
from edge_agent.config import AgentSettings

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_number() -> int:
    """A number for the machine's present run, another one after each start of the machine; 0 if it has none.

    The kernel's boot id, cut to what fits a signed 64-bit integer.
    """
    try:
        return UUID(BOOT_ID.read_text(encoding="ascii").strip()).int >> 65
    except (OSError, ValueError):
        return 0


def capabilities(settings: AgentSettings, inference_url: str = "") -> Capabilities:
    """What this device can do. The data folder must exist, for its disk is the one that counts."""
    return Capabilities(
        agent_version=version("edgeferry"),
        patch_codecs=CODECS,
        variants=settings.variants,
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        disk_bytes=shutil.disk_usage(settings.data).total,
        machine=platform.machine(),
        inference_url=inference_url,
    )
