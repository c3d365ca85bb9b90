"""What this machine is: the facts that a device tells its controller when it joins and when it connects.

Facts only, asked of the operating system; how busy the machine is at a moment is a heartbeat's business.
"""

import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from uuid import UUID

import psutil
from msgspec import UNSET

from common.artifact import digest_of
from common.delta import CODECS
from common.wire import Capabilities
from edge_agent.config import AgentSettings

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CPU_INFO = Path("/proc/cpuinfo")
PROCESSOR_NAMES = ("model name", "Model", "Hardware", "cpu model")
"""Where a kernel says which processor or board this is, by architecture."""
PROCESSOR_CHARS_MAX = 120
PROVIDERS_CHARS_MAX = 120


def boot_number() -> int:
    """A number for the machine's present run, another one after each start of the machine; 0 if it has none.

    The kernel's boot id, cut to what fits a signed 64-bit integer.
    """
    try:
        return UUID(BOOT_ID.read_text(encoding="ascii").strip()).int >> 65
    except (OSError, ValueError):
        return 0


def device_class(runtime: str, setup: str, providers: Sequence[str], cpu_info: Path = CPU_INFO) -> str:
    """What this device and those that are built like it call themselves: everything that decides how fast a run is, as
    far as it can be asked. It stays the same from start to start.

    `runtime` is the engine's version, `setup` all about the engine and the processor's features that matters to it, as
    text (only its digest is part of the name), `providers` those that releases may run on.
    """
    processor, cpus = _processor(cpu_info), len(os.sched_getaffinity(0))
    known = "+".join(name.removesuffix("ExecutionProvider") for name in providers)
    parts = (platform.machine(), processor, f"{cpus} CPUs", f"onnxruntime {runtime}", known[:PROVIDERS_CHARS_MAX])
    digest = digest_of("\n".join((*parts, *providers, setup)).encode())
    return ", ".join((*parts, digest.removeprefix("sha256:")[:8]))


def _processor(cpu_info: Path) -> str:
    """The processor's or the board's name, else the numbers of its cores' makers and designs."""
    try:
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    facts = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
    named = next((value for key, value in facts if key in PROCESSOR_NAMES and value), "")
    numbers = sorted({f"{key} {value}" for key, value in facts if key in {"CPU implementer", "CPU part"}})
    return (named or " ".join(numbers) or "processor unknown")[:PROCESSOR_CHARS_MAX]


def capabilities(settings: AgentSettings, inference_url: str = "", device_class: str = "") -> Capabilities:
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
        device_class=device_class or UNSET,
    )
