"""Which provider a probe has chosen, kept over restarts: a small file that is worth no more than a second probe.

An entry is named by everything that the choice depends on. While a provider is being tried the file says so; when the
program died in that moment, the provider is to blame and stays out, not the release.
"""

import hashlib
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec

from common.durable import write_file
from common.errors import StorageFull
from edge_agent.inference.providers import Choice

logger = logging.getLogger(__name__)

FILE_NAME = "providers.json"
ENTRIES_MAX = 64
"""The oldest is forgotten first."""
CPU_INFO = Path("/proc/cpuinfo")
NAMES = ("model name", "Model", "Hardware", "cpu model")
"""Where a kernel says which processor this is, by architecture."""


class Entry(msgspec.Struct, frozen=True):
    """What is known: the `choice`, if a probe came to its end; what it is `trying`; what the program `died` over."""

    choice: Choice | None = None
    trying: str = ""
    died: tuple[str, ...] = ()


class ProviderMemory:
    """Entries by key, in the file at `path`. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = _read(path)
        for key, entry in self._entries.items():
            if entry.trying:
                self._entries[key] = Entry(died=(*entry.died, entry.trying))

    def get(self, key: str) -> Entry:
        """What is known under `key`."""
        return self._entries.get(key, Entry())

    def close(self) -> None:
        """The program ends in good order: a provider that is being tried has done nothing wrong."""
        for key, entry in list(self._entries.items()):
            if entry.trying:
                self.put(key, Entry(died=entry.died))

    def put(self, key: str, entry: Entry) -> None:
        """Remember it, on the disk if that takes it."""
        self._entries.pop(key, None)
        self._entries[key] = entry
        while len(self._entries) > ENTRIES_MAX:
            del self._entries[next(iter(self._entries))]
        try:
            write_file(self._path, msgspec.json.encode(self._entries))
        except (OSError, StorageFull) as error:
            logger.warning("cannot remember the choice of a provider", extra={"reason": str(error)})


def key_of(identity: str, runtime: str, providers: Sequence[str]) -> str:
    """The name of a choice for the files `identity` with this version of the runtime and these providers, here."""
    facts = [identity, runtime, *providers, platform.machine(), _processor(), str(os.cpu_count())]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _processor() -> str:
    try:
        lines = CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.partition(":")[0].strip() in NAMES), "")


def _read(path: Path) -> dict[str, Entry]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Entry])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be read; providers are tried again", path, extra={"reason": str(error)})
        return {}
