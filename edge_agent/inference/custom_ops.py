"""Shared libraries with operators, from a release into ONNX Runtime: native code in the agent's process.

A library is loaded only where the device's owner allows it, and only if it was built for the machine of this very
program; the files themselves have been held against their signed digests by whoever filled and checked the slot.

The dynamic loader takes a library that is loaded already for the one that is asked for when the names are the same, and
a slot has the same name for every release. So each load goes through a name of its own; then the file decides.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.artifact.elf import HEADER_BYTES, Machine, machine_of
from common.errors import Forbidden, InvalidInput, NotFound
from edge_agent.inference.engine import EngineFailure

SETTING_FIX = 'set custom_ops = "allow" on the device if you trust the publishers of its releases with native code'


def refuse_custom_ops() -> Forbidden:
    """What a device answers whose owner does not allow libraries."""
    return Forbidden("the release brings native code, and this device's owner allows none", fix=SETTING_FIX)


@contextmanager
def loadable(libraries: Sequence[Path]) -> Iterator[list[str]]:
    """The libraries under names that no other load has had, for the block.

    Raises `EngineFailure` for one that is not for this machine, `NotFound` when the file is not there.
    """
    for library in libraries:
        _check_machine(library)
    with tempfile.TemporaryDirectory(prefix="ferry-ops-") as folder:
        links = [Path(folder) / f"{number}-{library.name}" for number, library in enumerate(libraries)]
        for link, library in zip(links, libraries, strict=True):
            link.symlink_to(library.resolve())
        yield [str(link) for link in links]


def _check_machine(library: Path) -> None:
    own = _machine_of(Path(sys.executable))
    try:
        found = _machine_of(library)
    except InvalidInput as error:
        raise EngineFailure(f"custom operators {library.name}: {error}") from error
    if found != own:
        raise EngineFailure(f"custom operators {library.name} are for {found}, this device is {own}")


def _machine_of(path: Path) -> Machine:
    try:
        with path.open("rb") as file:
            return machine_of(file.read(HEADER_BYTES))
    except FileNotFoundError as error:
        raise NotFound(f"no library at {path}") from error
