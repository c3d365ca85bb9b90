"""What patches cost: bytes, CPU time and memory, ours beside zstd on the same files in the same process.

Pairs: two real releases of one model (a retrain, which a copying codec cannot make small), and the newer one with a
tensor of 856 bytes changed (what a recalibration does). The long form adds a model of 96 MB and the memory needed.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnx
from backports import zstd

from benchmarks.report import ROOT, Row, at_most, figure, quick, write
from common import delta
from common.artifact.digest import digest_of
from common.artifact.manifest import ArtifactRef
from common.artifact.source import BytesSource
from common.filesource import FileSource

T = TypeVar("T")

COMMAND = "make bench-delta"
MODELS = ROOT / ".demo" / "models"
OLD = MODELS / "magika-0.6.1" / "magika" / "models" / "standard_v3_2" / "model.onnx"
NEW = MODELS / "magika-0.6.3" / "magika" / "models" / "standard_v3_3" / "model.onnx"
CHANGED_TENSOR_BYTES = 856
LARGE_BYTES = 96 * 1024 * 1024
REPEATS = 3 if quick() else 7


class Cost(NamedTuple):
    """What one way of sending `target` to the owner of `base` costs."""

    patch_bytes: int
    make_s: float
    apply_s: float


def main() -> None:
    old, new = OLD.read_bytes(), NEW.read_bytes()
    rows = [*_pair("tensor changed", new, _with_changed_tensor(new), small=True), *_pair("retrain", old, new)]
    if not quick():
        rows += _large()
    write("delta", "Patches", rows, _INTRO)


_INTRO = """
Two real releases of one model of 3.2 MB (a retrain), and the newer one with a tensor of 856 bytes changed. `ours` is
`common/delta`; `zstd patch` is zstd with the old file as prefix and long distance matching, which is what
`zstd --patch-from` does; `zstd full` sends the new file alone. Times are CPU seconds, the best of several runs.
"""


def _pair(name: str, base: bytes, target: bytes, *, small: bool = False) -> Iterator[Row]:
    ours, full = _ours(base, target), _zstd_full(target)
    yield figure(f"{name}: new file", measured=len(target), unit="bytes", command=COMMAND)
    if small:
        yield at_most(f"{name}: ours", 5_000, measured=ours.patch_bytes, unit="bytes", command=COMMAND)
    else:
        limit = round(1.01 * full.patch_bytes)
        yield at_most(f"{name}: ours", limit, measured=ours.patch_bytes, unit="bytes", command=COMMAND)
    yield at_most(f"{name}: ours, make", 1.0, measured=ours.make_s, unit="CPU s", command=COMMAND)
    yield figure(f"{name}: ours, apply (digests included)", measured=ours.apply_s, unit="CPU s", command=COMMAND)
    for level in (3, 19):
        peer, peers_name = _zstd_patch(base, target, level), f"{name}: zstd patch, level {level}"
        yield figure(peers_name, measured=peer.patch_bytes, unit="bytes", command=COMMAND)
        yield figure(f"{peers_name}, make", measured=peer.make_s, unit="CPU s", command=COMMAND)
        yield figure(f"{peers_name}, apply (no digests)", measured=peer.apply_s, unit="CPU s", command=COMMAND)
    yield figure(f"{name}: zstd full, level 19", measured=full.patch_bytes, unit="bytes", command=COMMAND)


def _large() -> Iterator[Row]:
    """A made-up model of weights, one tensor in a hundred changed: time and memory in processes of their own."""
    weights = np.random.default_rng(7).standard_normal(LARGE_BYTES // 4, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        base, target, patch = (Path(folder) / name for name in ("base", "target", "patch"))
        base.write_bytes(weights.tobytes())
        weights[1_000_000:1_250_000] += 1
        target.write_bytes(weights.tobytes())
        for what, work in (("make", _make_files), ("apply", _apply_files)):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                seconds, memory_mb = process.submit(work, base, target, patch).result()
            yield figure(f"96 MB, 1 % changed: {what}", measured=seconds, unit="CPU s", command=COMMAND)
            limit = 200 if what == "make" else 80
            name = f"96 MB, 1 % changed: peak memory to {what}"
            yield at_most(name, limit, measured=memory_mb, unit="MB RSS", command=COMMAND)
        yield figure("96 MB, 1 % changed: ours", measured=patch.stat().st_size, unit="bytes", command=COMMAND)


def _make_files(base: Path, target: Path, patch: Path) -> tuple[float, float]:
    with FileSource(base) as old, FileSource(target) as new, patch.open("wb") as sink:
        _, seconds = _cpu(lambda: delta.make(old, new, sink.write))
    return seconds, _peak_mb()


def _apply_files(base: Path, target: Path, patch: Path) -> tuple[float, float]:
    del target
    with FileSource(base) as old, FileSource(patch) as source, patch.with_name("again").open("wb") as sink:
        reference = delta.inspect(source).target
        _, seconds = _cpu(lambda: delta.apply(old, source, sink.write, target=reference))
    return seconds, _peak_mb()


def _peak_mb() -> float:
    """The most this process had in memory. Not `ru_maxrss`: Linux starts that at the parent's over a fork and exec."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def _ours(base: bytes, target: bytes) -> Cost:
    patch, make_s = _best(lambda: _collect(lambda sink: delta.make(BytesSource(base), BytesSource(target), sink)))
    reference = ArtifactRef(digest_of(target), len(target))
    old, source = BytesSource(base), BytesSource(patch)
    rebuilt, apply_s = _best(lambda: _collect(lambda sink: delta.apply(old, source, sink, target=reference)))
    assert rebuilt == target
    return Cost(len(patch), make_s, apply_s)


def _zstd_patch(base: bytes, target: bytes, level: int) -> Cost:
    window_log = max(10, (len(base) + len(target)).bit_length())
    making: dict[Any, int] = {
        zstd.CompressionParameter.compression_level: level,
        zstd.CompressionParameter.window_log: window_log,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    applying: dict[Any, int] = {zstd.DecompressionParameter.window_log_max: window_log}
    prefix = zstd.ZstdDict(base, is_raw=True).as_prefix
    patch, make_s = _best(lambda: zstd.compress(target, options=making, zstd_dict=prefix))
    rebuilt, apply_s = _best(lambda: zstd.decompress(patch, options=applying, zstd_dict=prefix))
    assert rebuilt == target
    return Cost(len(patch), make_s, apply_s)


def _zstd_full(target: bytes) -> Cost:
    patch, make_s = _best(lambda: zstd.compress(target, 19))
    _, apply_s = _best(lambda: zstd.decompress(patch))
    return Cost(len(patch), make_s, apply_s)


def _with_changed_tensor(model_bytes: bytes) -> bytes:
    """The model with new values in the first tensor of `CHANGED_TENSOR_BYTES`, every other byte the same."""
    tensors = onnx.load_from_string(model_bytes).graph.initializer
    raw = next(tensor.raw_data for tensor in tensors if len(tensor.raw_data) == CHANGED_TENSOR_BYTES)
    changed = np.frombuffer(raw, np.float32) + np.random.default_rng(7).normal(0, 0.01, len(raw) // 4)
    return model_bytes.replace(raw, changed.astype(np.float32).tobytes(), 1)


def _collect(work: Callable[[Callable[[bytes], object]], object]) -> bytes:
    parts: list[bytes] = []
    work(parts.append)
    return b"".join(parts)


def _best(work: Callable[[], bytes]) -> tuple[bytes, float]:
    runs = [_cpu(work) for _ in range(REPEATS)]
    return runs[0][0], min(seconds for _, seconds in runs)


def _cpu(work: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


if __name__ == "__main__":
    main()
