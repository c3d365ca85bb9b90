"""The tools that make patches, ours among them, and one measurement of a tool on a pair.

A tool makes and applies in child processes, whose CPU time and peak memory count; it gets `CPU_S_MAX` for each. What it
rebuilt is compared with the new file, and a tool that crashes, takes too long or gives other bytes has failed on that
pair, which is a result too. A tool that is not installed is left out, with a message.
"""

import filecmp
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from benchmarks.delta import pairs
from benchmarks.delta.figures import (
    BSDIFF4,
    HDIFFPATCH,
    OURS,
    OURS_ZSTD_ONLY,
    XDELTA3,
    ZIPNN,
    ZSTD_FULL,
    ZSTD_PATCH,
    Cost,
    Outcome,
)
from benchmarks.delta.pairs import Pair
from benchmarks.report import ROOT

CPU_S_MAX = 900
APPLY_REPEATS = 3
XDELTA_WINDOW_BYTES_MIN = 64 * 1024 * 1024
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""As the registry's workers have it: threads that wait for each other burn CPU time."""

Command = Callable[[Pair, Path, Path], Sequence[str]]


class Tool(msgspec.Struct, frozen=True):
    """How to make and apply with one tool."""

    name: str
    make: Command
    apply: Command
    installed: Callable[[], bool]


class _Failed(Exception):
    """A child process did not do its act."""


def measure(tool: Tool, pair: Pair) -> Outcome:
    """Make a patch once, apply it `APPLY_REPEATS` times (the least CPU time and the most memory count), compare."""
    with tempfile.TemporaryDirectory(prefix="bench-delta-") as folder:
        patch, rebuilt = Path(folder) / "patch", Path(folder) / "rebuilt"
        try:
            create = _cost(tool.make(pair, patch, rebuilt))
            runs = [_cost(tool.apply(pair, patch, rebuilt)) for _ in range(APPLY_REPEATS)]
        except _Failed as failure:
            return Outcome(tool=tool.name, problem=str(failure))
        if not filecmp.cmp(rebuilt, pair.new, shallow=False):
            return Outcome(tool=tool.name, problem="gave other bytes")
        apply = Cost(min(run.cpu_s for run in runs), max(run.peak_mb for run in runs))
        return Outcome(tool=tool.name, patch_bytes=patch.stat().st_size, create=create, apply=apply)


def _cost(command: Sequence[str]) -> Cost:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:]
        raise _Failed(f"failed: {said[0] if said else f'exit code {done.returncode}'}"[:200])
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Cost)


def _program(*words: str) -> list[str]:
    return [sys.executable, "-S", "-E", "-m", "benchmarks.delta.launched", str(CPU_S_MAX), *words]


def _worker(act: str, *files: Path, python: str = sys.executable) -> list[str]:
    return [python, "-W", "ignore", "-m", "benchmarks.delta.workers", act, str(CPU_S_MAX), *map(str, files)]


def _library(name: str, making: str, applying: str, module: str) -> Tool:
    return Tool(
        name,
        lambda pair, patch, _: _worker(making, pair.old, pair.new, patch),
        lambda pair, patch, rebuilt: _worker(applying, pair.old, patch, rebuilt),
        lambda: importlib.util.find_spec(module) is not None,
    )


def _zstd_full() -> Tool:
    return Tool(
        ZSTD_FULL,
        lambda pair, patch, _: _program("zstd", "-q", "-f", "-19", str(pair.new), "-o", str(patch)),
        lambda _, patch, rebuilt: _program("zstd", "-q", "-f", "-d", str(patch), "-o", str(rebuilt)),
        lambda: shutil.which("zstd") is not None,
    )


def _zstd_patch() -> Tool:
    def options(pair: Pair) -> list[str]:
        largest = max(pair.old.stat().st_size, pair.new.stat().st_size)
        return ["-q", "-f", f"--long={max(27, largest.bit_length())}", f"--patch-from={pair.old}"]

    return Tool(
        ZSTD_PATCH,
        lambda pair, patch, _: _program("zstd", *options(pair), "-19", str(pair.new), "-o", str(patch)),
        lambda pair, patch, rebuilt: _program("zstd", *options(pair), "-d", str(patch), "-o", str(rebuilt)),
        lambda: shutil.which("zstd") is not None,
    )


def _xdelta3() -> Tool:
    def options(pair: Pair) -> list[str]:
        window = max(XDELTA_WINDOW_BYTES_MIN, 1 << (pair.old.stat().st_size - 1).bit_length())
        return ["-q", "-f", "-B", str(window), "-s", str(pair.old)]

    return Tool(
        XDELTA3,
        lambda pair, patch, _: _program("xdelta3", "-e", "-9", *options(pair), str(pair.new), str(patch)),
        lambda pair, patch, rebuilt: _program("xdelta3", "-d", *options(pair), str(patch), str(rebuilt)),
        lambda: shutil.which("xdelta3") is not None,
    )


def _zipnn() -> Tool:
    """ZipNN needs torch, so it lives in the toolchain's environment."""
    python = str(pairs.TOOLCHAIN_PYTHON)
    act = partial(_worker, python=python)
    return Tool(
        ZIPNN,
        lambda pair, patch, _: act(f"zipnn-{pair.dtype}-make", pair.old, pair.new, patch),
        lambda pair, patch, rebuilt: act(f"zipnn-{pair.dtype}-apply", pair.old, patch, rebuilt),
        lambda: any(pairs.TOOLCHAIN_PYTHON.parent.parent.glob("lib/*/site-packages/zipnn")),
    )


TOOLS: tuple[Tool, ...] = (
    _library(OURS, "tensor-pco.1-make", "ours-apply", "pcodec"),
    _library(OURS_ZSTD_ONLY, "tensor-zstd.1-make", "ours-apply", "common"),
    _zstd_full(),
    _zstd_patch(),
    _xdelta3(),
    _library(BSDIFF4, "bsdiff4-make", "bsdiff4-apply", "bsdiff4"),
    _library(HDIFFPATCH, "hdiffpatch-make", "hdiffpatch-apply", "hdiffpatch"),
    _zipnn(),
)
