"""A patch rebuilds exactly the target from exactly the base, is small where little changed, and is never believed."""

import random
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd

from common import delta
from common.artifact.manifest import ArtifactRef
from common.artifact.source import PIECE_BYTES, BytesSource
from common.delta.layout import BLOCK, CODEC, HEADER, LITERAL_BYTES_MAX, WINDOW_LOG
from common.delta.matching import BLOCK_BYTES_MIN, BlockIndex, block_bytes_for, block_hashes, rolling_hashes
from common.errors import IntegrityFailure
from tests.patches import crafted_patch, patch_between, rebuilt, reference_to

BASE = random.Random(1).randbytes(200_000)
TARGET = BASE[:70_001] + b"something new" + BASE[70_100:150_000] + BASE[10_000:40_003]


def test_a_changed_tensor_of_856_bytes_in_a_real_model_takes_less_than_5_kb(real_models: tuple[Path, Path]) -> None:
    model = real_models[1].read_bytes()
    target = model[:1_000_001] + random.Random(2).randbytes(856) + model[1_000_857:]
    patch = patch_between(model, target)
    assert len(patch) < 5_000
    assert rebuilt(model, patch, target) == target


def test_a_real_retrain_is_rebuilt_and_costs_no_more_than_the_compressed_file(real_models: tuple[Path, Path]) -> None:
    old, new = (path.read_bytes() for path in real_models)
    patch = patch_between(old, new)
    assert rebuilt(old, patch, new) == new
    assert len(patch) < 1.01 * len(zstd.compress(new, 19))


def test_moved_and_inserted_bytes_are_found_at_any_offset() -> None:
    patch = patch_between(BASE, TARGET)
    assert len(patch) < 400
    assert rebuilt(BASE, patch, TARGET) == TARGET


def test_an_unchanged_run_of_two_blocks_is_always_found() -> None:
    run = 2 * BLOCK_BYTES_MIN
    noise = random.Random(3)
    parts = [noise.randbytes(60) + BASE[start : start + run] for start in range(17, 100_000, 5_003)]
    summary = delta.inspect(BytesSource(patch_between(BASE, b"".join(parts))))
    copied = {operation.kind: operation.output_bytes for operation in summary.operations}["copy"]
    assert copied >= run * len(parts)


@pytest.mark.parametrize(
    ("base", "target"),
    [
        (b"", b""),
        (b"", BASE),
        (BASE, b""),
        (BASE, BASE),
        (b"short", b"shorter"),
        (bytes(1_000) + b"1", bytes(3_000_000)),
        (BASE, BASE * 3),
        (BASE, random.Random(4).randbytes(2 * LITERAL_BYTES_MAX + 7)),
        (BASE, BASE + random.Random(5).randbytes(LITERAL_BYTES_MAX)),
    ],
    ids=["nothing", "from-nothing", "to-nothing", "same", "tiny", "zeros", "thrice", "noise", "exactly-a-full-block"],
)
def test_corner_cases_come_back_whole_and_are_told_truly(base: bytes, target: bytes) -> None:
    parts: list[bytes] = []
    summary = delta.make(BytesSource(base), BytesSource(target), parts.append)
    patch = b"".join(parts)
    assert rebuilt(base, patch, target) == target
    assert delta.inspect(BytesSource(patch)) == summary
    assert (summary.base, summary.target) == (reference_to(base), reference_to(target))
    assert summary.patch_bytes == len(patch)
    assert sum(operation.output_bytes for operation in summary.operations) == len(target)


def test_many_small_changes_span_several_blocks() -> None:
    data = np.frombuffer(random.Random(6).randbytes(6_000_000), np.uint8).copy()
    base = data.tobytes()
    data[::150] ^= 1
    patch = patch_between(base, data.tobytes())
    assert rebuilt(base, patch, data.tobytes()) == data.tobytes()
    assert delta.inspect(BytesSource(patch)).operations[0].count > 32 * 1024


def test_the_same_pair_gives_the_same_patch() -> None:
    assert patch_between(BASE, TARGET) == patch_between(BASE, TARGET)


def test_output_comes_in_bounded_pieces() -> None:
    target = bytes(3 * PIECE_BYTES)
    sizes: list[int] = []
    patch = BytesSource(patch_between(target, target))
    delta.apply(BytesSource(target), patch, lambda data: sizes.append(len(data)), target=reference_to(target))
    assert max(sizes) == PIECE_BYTES


def test_memory_stays_bounded_for_files_far_larger() -> None:
    base, target = Pattern(96 * 2**20, changed=False), Pattern(96 * 2**20, changed=True)
    parts: list[bytes] = []
    tracemalloc.start()
    try:
        summary = delta.make(base, target, parts.append)
        made_with = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        delta.apply(base, BytesSource(b"".join(parts)), lambda data: None, target=summary.target)
        applied_with = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made_with < 80 * 2**20
    assert applied_with < 8 * 2**20


def test_progress_grows_to_the_announced_total() -> None:
    seen: list[tuple[int, int]] = []
    delta.make(
        BytesSource(BASE),
        BytesSource(TARGET),
        lambda data: None,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {len(BASE) + 2 * len(TARGET)}
    assert seen[-1][0] == seen[-1][1]


def test_a_failing_sink_ends_the_work_with_its_own_error() -> None:
    def full(data: bytes) -> None:
        raise OSError(28, "no space")

    with pytest.raises(OSError, match="no space"):
        delta.make(BytesSource(BASE), BytesSource(TARGET), full)
    with pytest.raises(OSError, match="no space"):
        patch = BytesSource(patch_between(BASE, TARGET))
        delta.apply(BytesSource(BASE), patch, full, target=reference_to(TARGET))


def test_another_base_is_refused_before_anything_is_written() -> None:
    other = BASE[:-1] + b"\0"
    written: list[bytes] = []
    with pytest.raises(IntegrityFailure, match="the base is not"):
        patch = BytesSource(patch_between(BASE, TARGET))
        delta.apply(BytesSource(other), patch, written.append, target=reference_to(TARGET))
    assert not written


def test_a_patch_for_another_target_than_ordered_is_refused() -> None:
    patch = patch_between(BASE, TARGET)
    with pytest.raises(IntegrityFailure, match="the patch makes"):
        rebuilt(BASE, patch, BASE)
    with pytest.raises(IntegrityFailure, match="the patch makes"):
        rebuilt(BASE, patch, ArtifactRef(reference_to(TARGET).digest, len(TARGET) + 1))


def test_a_patch_that_writes_wrong_bytes_is_refused() -> None:
    lie = crafted_patch(b"base", b"wanted", [(6, 0, 0)], b"wronge")
    with pytest.raises(IntegrityFailure, match="other bytes"):
        rebuilt(b"base", lie, b"wanted")


@pytest.mark.parametrize(
    ("operations", "literals", "reason"),
    [
        ([(0, 5, 0)], b"", "more than the base"),
        ([(0, 2, 3)], b"", "outside the base"),
        ([(0, 2, -1)], b"", "outside the base"),
        ([(0, 2, 2**62)], b"", "outside the base"),
        ([(0, -1, 0)], b"", "impossible length"),
        ([(0, 2**62, 0)], b"", "impossible length"),
        ([(0, 0, 0)], b"", "exactly its literal bytes"),
        ([(2, 0, 0)], b"abc", "exactly its literal bytes"),
        ([(3, 0, 0)], b"ab", "exactly its literal bytes"),
        ([(0, 4, 0), (0, 4, 0)], b"", "more than the target"),
        ([(7, 0, 0)], b"1234567", "more than the target"),
        ([(2, 0, 0)], b"ab", "before the target is complete"),
    ],
)
def test_impossible_operations_are_refused(
    operations: list[tuple[int, int, int]], literals: bytes, reason: str
) -> None:
    hostile = crafted_patch(b"base", b"wanted", operations, literals)
    with pytest.raises(IntegrityFailure, match=reason):
        rebuilt(b"base", hostile, b"wanted")
    with pytest.raises(IntegrityFailure, match=reason):
        delta.inspect(BytesSource(hostile))


def test_a_block_without_operations_is_refused() -> None:
    header = patch_between(b"base", b"wanted")[: HEADER.size]
    with pytest.raises(IntegrityFailure, match="without operations"):
        rebuilt(b"base", header + BLOCK.pack(0, 0, 0, 0), b"wanted")


@pytest.mark.parametrize("numbers", [(2**32 - 1, 9, 0, 0), (1, 2**32 - 1, 0, 0), (1, 9, 2**32 - 1, 9), (1, 9, 0, 9)])
def test_lengths_over_the_limits_are_refused(numbers: tuple[int, int, int, int]) -> None:
    header = patch_between(b"base", b"wanted")[: HEADER.size]
    with pytest.raises(IntegrityFailure, match=r"limits|takes room"):
        rebuilt(b"base", header + BLOCK.pack(*numbers) + bytes(100), b"wanted")


def test_a_decompression_bomb_is_stopped_at_the_promised_length() -> None:
    window: dict[Any, int] = {zstd.CompressionParameter.window_log: WINDOW_LOG}
    compressor = zstd.ZstdCompressor(options=window)
    bomb = b"".join(compressor.compress(bytes(2**20)) for _ in range(400)) + compressor.flush()
    hostile = with_literal_frame(bomb)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(IntegrityFailure, match="compressed part"):
        rebuilt(b"base", hostile, b"wanted")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 64 * 1024


def test_a_frame_with_something_after_it_is_refused() -> None:
    with pytest.raises(IntegrityFailure, match="compressed part"):
        rebuilt(b"base", with_literal_frame(zstd.compress(b"wanted") + b"more"), b"wanted")


def test_a_frame_that_does_not_end_is_refused() -> None:
    endless = zstd.ZstdCompressor().compress(b"wanted", zstd.ZstdCompressor.FLUSH_BLOCK)
    with pytest.raises(IntegrityFailure, match="compressed part"):
        rebuilt(b"base", with_literal_frame(endless), b"wanted")


def test_other_files_versions_and_codecs_are_told_apart() -> None:
    patch = patch_between(BASE, TARGET)
    with pytest.raises(IntegrityFailure, match="not a patch"):
        delta.inspect(BytesSource(b"\x80\x02" + patch[2:]))
    with pytest.raises(IntegrityFailure, match="not a patch"):
        delta.inspect(BytesSource(b""))
    with pytest.raises(IntegrityFailure, match="version 9"):
        delta.inspect(BytesSource(patch[:8] + b"\x09\0" + patch[10:]))
    with pytest.raises(IntegrityFailure, match=r"codec 'tensors\.7'"):
        delta.inspect(BytesSource(patch[:10] + b"tensors.7".ljust(16, b"\0") + patch[26:]))
    assert CODEC in delta.CODECS


def test_bytes_after_the_last_block_are_refused() -> None:
    with pytest.raises(IntegrityFailure, match="1 bytes follow"):
        rebuilt(BASE, patch_between(BASE, TARGET) + b"!", TARGET)


def test_the_rolling_and_the_block_hash_are_the_same_function() -> None:
    data = np.frombuffer(BASE[:4096], np.uint8)
    assert (rolling_hashes(data, 64)[::64] == block_hashes(data, 64)).all()


def test_blocks_grow_with_the_base_so_that_the_index_does_not() -> None:
    assert block_bytes_for(0) == BLOCK_BYTES_MIN == block_bytes_for(64 * 2**20)
    assert block_bytes_for(100 * 2**20) == 128
    assert block_bytes_for(2**34) == 16 * 1024


def test_the_index_takes_a_base_in_pieces_of_any_length() -> None:
    index = BlockIndex(len(BASE))
    for start in range(0, len(BASE), 999):
        index.take(BASE[start : start + 999])
    index.finish()
    places, offsets = index.lookup(rolling_hashes(np.frombuffer(BASE, np.uint8), 64))
    assert (places == offsets).all()
    assert len(places) == len(BASE) // 64


def with_literal_frame(frame: bytes) -> bytes:
    """A patch from `base` to `wanted` that promises six literal bytes and has `frame` in their place."""
    good = crafted_patch(b"base", b"wanted", [(6, 0, 0)], b"wanted")
    table_bytes = BLOCK.unpack_from(good, HEADER.size)[1]
    table = good[HEADER.size + BLOCK.size :][:table_bytes]
    return good[: HEADER.size] + BLOCK.pack(1, table_bytes, 6, len(frame)) + table + frame


class Pattern:
    """A long source that takes no room: no two of its blocks are alike; `changed` replaces a few bytes far apart."""

    STRIDE = 8 * 2**20

    def __init__(self, size: int, *, changed: bool) -> None:
        self.size = size
        self._changed = changed

    def read_at(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        words = np.arange(offset // 8, -(-end // 8), dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)
        if self._changed:
            words[np.arange(len(words)) + offset // 8 & (self.STRIDE - 1) == 5] += np.uint64(1)
        start = offset - offset // 8 * 8
        return words.tobytes()[start : start + end - offset]
