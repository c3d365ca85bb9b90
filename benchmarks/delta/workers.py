"""One act of one Python library in a process of its own: `python -m benchmarks.delta.workers ACT CPU_S_MAX FILES...`.

`ACT` is a key of `ACTS`; the files are the old one, then for making the new one and where to put the patch, for
applying the patch and where to put the new file. Prints JSON: the CPU seconds of the act (the interpreter's start and
imports are not in it, an agent starts once), and the most memory that the whole process had. Each act imports only what
it needs, and nothing of what another environment lacks.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

Work = Callable[[], object]
WEIGHTS_FILE = "weights.bin"


def main() -> None:
    act, limit_s, *files = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s)))
    work = ACTS[act](*map(Path, files))
    start = time.process_time()
    work()
    cpu_s = time.process_time() - start
    print(json.dumps({"cpu_s": cpu_s, "peak_mb": _peak_mb()}))


def _peak_mb() -> float:
    """Not `ru_maxrss`: Linux starts that at the parent's over a fork and exec."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def _our_making(codec: str) -> Callable[[Path, Path, Path], Work]:
    def prepared(old: Path, new: Path, patch: Path) -> Work:
        from common.artifact.source import ByteSource
        from common.artifact.weights import Weight, external_weights
        from common.delta.making import make
        from common.filesource import FileSource

        def described(path: Path, weights: ByteSource) -> tuple[Weight, ...] | None:
            """A data file is described by the graph beside it, as the registry does it."""
            if path.suffix != ".bin":
                return None
            with FileSource(path.with_suffix(".onnx")) as graph:
                return external_weights(graph, WEIGHTS_FILE, weights.size)

        def work() -> None:
            with FileSource(old) as base, FileSource(new) as target, patch.open("wb") as out:
                weights = (described(old, base), described(new, target))
                make(base, target, out.write, codec=codec, base_weights=weights[0], target_weights=weights[1])

        return work

    return prepared


def _our_applying(old: Path, patch: Path, new: Path) -> Work:
    """Names no target, since the caller compares whole files. Base and target are hashed all the same."""
    from common.delta.applying import apply
    from common.filesource import FileSource

    def work() -> None:
        with FileSource(old) as base, FileSource(patch) as source, new.open("wb") as out:
            apply(base, source, out.write, target=None)

    return work


def _bsdiff4_making(old: Path, new: Path, patch: Path) -> Work:
    import bsdiff4

    return lambda: bsdiff4.file_diff(str(old), str(new), str(patch))


def _bsdiff4_applying(old: Path, patch: Path, new: Path) -> Work:
    import bsdiff4

    return lambda: bsdiff4.file_patch(str(old), str(new), str(patch))


def _hdiffpatch_making(old: Path, new: Path, patch: Path) -> Work:
    """The smallest of its uncompressed form and two compressors, which all share one search for matches."""
    import hdiffpatch

    def work() -> None:
        plain = hdiffpatch.diff(old.read_bytes(), new.read_bytes(), hdiffpatch.COMPRESSION_NONE, validate=False)
        kinds = (hdiffpatch.COMPRESSION_ZSTD, hdiffpatch.COMPRESSION_LZMA2)
        patch.write_bytes(min(plain, *(hdiffpatch.recompress(plain, kind) for kind in kinds), key=len))

    return work


def _hdiffpatch_applying(old: Path, patch: Path, new: Path) -> Work:
    import hdiffpatch

    return lambda: new.write_bytes(hdiffpatch.apply(old.read_bytes(), patch.read_bytes()))


_ALONE, _WITH_BASE = b"\0", b"\1"


def _zipnn_making(dtype: str) -> Callable[[Path, Path, Path], Work]:
    """The exclusive-or with the old file where both have one size; the new file alone otherwise."""

    def make(old: Path, new: Path, patch: Path) -> Work:
        import zipnn

        def work() -> None:
            base, target = old.read_bytes(), new.read_bytes()
            if len(base) == len(target):
                coder = zipnn.ZipNN(bytearray_dtype=dtype, delta_compressed_type="byte")
                patch.write_bytes(_WITH_BASE + coder.compress(target, delta_second_data=base))
            else:
                patch.write_bytes(_ALONE + zipnn.ZipNN(bytearray_dtype=dtype).compress(target))

        return work

    return make


def _zipnn_applying(dtype: str) -> Callable[[Path, Path, Path], Work]:
    def apply(old: Path, patch: Path, new: Path) -> Work:
        import zipnn

        def work() -> None:
            form, data = (content := patch.read_bytes())[:1], content[1:]
            if form == _WITH_BASE:
                coder = zipnn.ZipNN(bytearray_dtype=dtype, delta_compressed_type="byte")
                new.write_bytes(coder.decompress(data, delta_second_data=old.read_bytes()))
            else:
                new.write_bytes(zipnn.ZipNN(bytearray_dtype=dtype).decompress(data))

        return work

    return apply


ZIPNN_DTYPES = ("float32", "float16", "bfloat16")
ACTS: dict[str, Callable[..., Work]] = {
    **{f"zipnn-{dtype}-make": _zipnn_making(dtype) for dtype in ZIPNN_DTYPES},
    **{f"zipnn-{dtype}-apply": _zipnn_applying(dtype) for dtype in ZIPNN_DTYPES},
    "tensor-pco.1-make": _our_making("tensor-pco.1"),
    "tensor-zstd.1-make": _our_making("tensor-zstd.1"),
    "ours-apply": _our_applying,
    "bsdiff4-make": _bsdiff4_making,
    "bsdiff4-apply": _bsdiff4_applying,
    "hdiffpatch-make": _hdiffpatch_making,
    "hdiffpatch-apply": _hdiffpatch_applying,
}


if __name__ == "__main__":
    main()
