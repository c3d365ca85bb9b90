"""The program that builds one patch, in a process of its own: `python -m controller.registry.patch_worker ORDER`.

Building takes seconds of CPU and much memory, and reads files that strangers made; if it dies, only it dies. It is
niced, ignores Ctrl-C (its parent decides), and ends when its standard input does, which is when the parent is gone. The
kernel ends it with SIGXCPU when it has used the CPU time that its order allows. It proves the patch by applying it
before it says that it is done.

`ORDER` is JSON. Standard output is one JSON object a line: `Progress` now and then, one `Result` at the end; anything
else, and any end without a result, means that the worker broke.
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import msgspec

from common import delta
from common.artifact.digest import Hasher
from common.artifact.manifest import ArtifactRef
from common.artifact.weights import Weight, external_weights
from common.durable import explaining_full_disk
from common.errors import FerryError, IntegrityFailure
from common.filesource import FileSource

NICENESS = 10
PROGRESS_STEPS = 20
"""At most so many lines of progress."""


class Description(msgspec.Struct, frozen=True):
    """The ONNX file at `path` says which tensor is where in a data file that it calls `location`."""

    path: str
    location: str


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Build into the file `out` the patch from `base` to `target`, unless it needs more than `bytes_max`.

    The descriptions are for files that hold the external data of an ONNX model; others describe themselves.
    """

    base: ArtifactRef
    base_path: str
    target: ArtifactRef
    target_path: str
    out: str
    bytes_max: int
    codec: str
    cpu_s_max: int
    """User and system time of the whole process, all of its threads."""
    threads: int = 1
    base_described: Description | None = None
    target_described: Description | None = None


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far it is; the unit is the codec's own."""

    done: int
    total: int


class Result(msgspec.Struct, frozen=True, tag="result"):
    """How it ended: `built` with the name of the patch, or why not; `code` is that of the error (`common.errors`)."""

    state: Literal["built", "too_big", "failed"]
    patch: ArtifactRef | None = None
    code: str = ""
    reason: str = ""


class _TooBigError(Exception):
    """The patch has passed the size up to which it is worth sending."""


def main() -> None:
    """Build the patch and say how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    order = msgspec.json.decode(sys.argv[1], type=Order)
    _limit_cpu(order.cpu_s_max)
    _say(build(order, _say))


def build(order: Order, tell: Callable[[Progress], object]) -> Result:
    """Write the patch, fsynced and proven, and say how it went; `tell` hears of the progress."""
    try:
        with FileSource(Path(order.base_path)) as base, FileSource(Path(order.target_path)) as target:
            patch = _make(order, base, target, tell)
            with FileSource(Path(order.out)) as made:
                delta.apply(base, made, _throw_away, target=order.target)
    except _TooBigError:
        return Result("too_big")
    except FerryError as error:
        return Result("failed", code=error.code, reason=error.message)
    return Result("built", patch)


def _make(order: Order, base: FileSource, target: FileSource, tell: Callable[[Progress], object]) -> ArtifactRef:
    hasher = Hasher()
    out = Path(order.out)
    with explaining_full_disk(out), out.open("wb") as file:

        def sink(data: bytes) -> None:
            if hasher.size + len(data) > order.bytes_max:
                raise _TooBigError
            hasher.update(data)
            file.write(data)

        with ThreadPoolExecutor(order.threads, thread_name_prefix="blocks") as pool:
            made = delta.make(
                base,
                target,
                sink,
                codec=order.codec,
                base_weights=_weights(order.base_described, base),
                target_weights=_weights(order.target_described, target),
                progress=_now_and_then(tell),
                each=pool.map,
            )
        file.flush()
        os.fsync(file.fileno())
    for named, found in ((order.base, made.base), (order.target, made.target)):
        if found != named:
            raise IntegrityFailure(f"the disk has damaged {named.digest}: its bytes now hash to {found.digest}")
    return ArtifactRef(hasher.digest(), hasher.size)


def _weights(description: Description | None, data: FileSource) -> tuple[Weight, ...] | None:
    """The tensors in `data`; None if it describes itself, or if its model does not know it by this name."""
    if description is None:
        return None
    with FileSource(Path(description.path)) as model:
        return external_weights(model, description.location, data.size) or None


def _now_and_then(tell: Callable[[Progress], object]) -> Callable[[int, int], object]:
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        step = done * PROGRESS_STEPS // max(total, 1)
        if step > told:
            told = step
            tell(Progress(done, total))

    return progress


def _limit_cpu(seconds: int) -> None:
    """At the soft limit the kernel sends SIGXCPU, which ends a process that does not handle it; leave no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = seconds if hard == resource.RLIM_INFINITY else min(seconds, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _throw_away(data: bytes) -> None:
    """Where a proven target goes."""


def _say(line: Progress | Result) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def _end_with_parent() -> None:
    """Block until standard input ends; nobody writes to it. Not through `sys.stdin`, whose lock would hang the exit."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
