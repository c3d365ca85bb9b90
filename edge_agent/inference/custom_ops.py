"""Shared libraries with operators, from a release into ONNX Runtime: native code in the agent's process.

A library is loaded only where the device's owner allows it, and only if it was built for the machine of this very
program; the files themselves have been held against their signed digests by whoever filled and checked the slot.

The dynamic loader takes a library that is loaded already for the one that is asked for when the names are the same, and
a slot has the same name for every release. So each load writes the path in a way of its own; then the file decides.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from common.artifact.elf import HEADER_BYTES, Machine, machine_of
from common.errors import Forbidden, InvalidInput, NotFound
from edge_agent.inference.engine import EngineFailure

SETTING_FIX = 'set custom_ops = "allow" on the device if you trust the publishers of its releases with native code'
LOAD_BITS = 32
"""Of the number of a load."""

_loads = itertools.count()


def refuse_custom_ops() -> Forbidden:
    """What a device answers whose owner does not allow libraries."""
    return Forbidden("the release brings native code, and this device's owner allows none", fix=SETTING_FIX)


def loadable(libraries: Sequence[Path]) -> list[str]:
    """The libraries under names that no other load in this process has had.

    Raises `EngineFailure` for one that is not for this machine, `NotFound` when the file is not there.
    """
    for library in libraries:
        _check_machine(library)
    return [_new_name(library.absolute()) for library in libraries]


def _new_name(library: Path) -> str:
    """Another way to write the path: the number of the load in bits, a slash or a slash and a dot for each."""
    number = next(_loads)
    bits = "".join("/." if number >> bit & 1 else "/" for bit in range(LOAD_BITS))
    return f"{library.parent}{bits}/{library.name}"


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
