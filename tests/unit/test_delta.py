"""A patch rebuilds exactly the target from exactly the base, is small where little changed, and is never believed."""

import random
import resource
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd

from common import delta
from common.artifact.manifest import ArtifactRef
from common.artifact.source import PIECE_BYTES, BytesSource
from common.delta.layout import CONTROL_BYTES_MAX, FRAMED, LITERAL_BYTES_MAX, PAYLOAD_BYTES_MAX
from common.delta.tensors import ELEMENTS_MAX, NO_BASE, DType
from common.delta.varint import varint
from common.errors import IntegrityFailure, InvalidInput
from tests.patches import add, block, copy, header, literal, patch_between, rebuilt, reference_to, section

BASE = random.Random(1).randbytes(200_000)
TARGET = BASE[:70_001] + b"something new" + BASE[70_100:150_000] + BASE[10_000:40_003]


def test_a_changed_tensor_of_856_bytes_in_a_real_model_takes_less_than_1_kb(real_models: tuple[Path, Path]) -> None:
    model = real_models[1].read_bytes()
    target = model[:1_000_001] + random.Random(2).randbytes(856) + model[1_000_857:]
    patch = patch_between(model, target)
    assert len(patch) < 1_000
    assert rebuilt(model, patch, target) == target


@cache
def retraining(old: Path, new: Path, codec: str) -> bytes:
    """The patch between two real models. It takes seconds, so tests that look at it share a worker and one patch."""
    return patch_between(old.read_bytes(), new.read_bytes(), codec)


@pytest.mark.xdist_group("retraining")
@pytest.mark.parametrize("codec", delta.CODECS)
def test_a_real_retrain_is_rebuilt_and_costs_less_than_the_compressed_file(
    real_models: tuple[Path, Path], codec: str
) -> None:
    old, new = (path.read_bytes() for path in real_models)
    patch = retraining(*real_models, codec)
    assert rebuilt(old, patch, new) == new
    assert len(patch) < 0.95 * len(zstd.compress(new, 19))


def test_moved_and_inserted_bytes_are_found_at_any_offset() -> None:
    patch = patch_between(BASE, TARGET)
    assert len(patch) < 100
    assert rebuilt(BASE, patch, TARGET) == TARGET


CORNERS = {
    "nothing": (b"", b""),
    "from-nothing": (b"", BASE),
    "to-nothing": (BASE, b""),
    "same": (BASE, BASE),
    "tiny": (b"short", b"shorter"),
    "zeros": (bytes(1_000) + b"1", bytes(3_000_000)),
    "thrice": (BASE, BASE * 3),
    "noise": (BASE, random.Random(4).randbytes(2 * LITERAL_BYTES_MAX + 7)),
    "exactly-a-full-stream": (BASE, BASE + random.Random(5).randbytes(LITERAL_BYTES_MAX)),
}


@pytest.mark.parametrize("codec", delta.CODECS)
@pytest.mark.parametrize(("base", "target"), CORNERS.values(), ids=CORNERS)
def test_corner_cases_come_back_whole_and_are_told_truly(base: bytes, target: bytes, codec: str) -> None:
    parts: list[bytes] = []
    made = delta.make(BytesSource(base), BytesSource(target), parts.append, codec=codec)
    patch = b"".join(parts)
    assert rebuilt(base, patch, target) == target
    assert (made.base, made.target, made.patch_bytes) == (reference_to(base), reference_to(target), len(patch))
    summary = delta.inspect(BytesSource(patch))
    assert (summary.codec, summary.base_bytes, summary.target_bytes) == (codec, len(base), len(target))
    assert sum(operation.output_bytes for operation in summary.operations) == len(target)
    assert sum(operation.patch_bytes for operation in summary.operations) == len(patch)


def test_an_equal_file_costs_no_more_than_a_header() -> None:
    assert len(patch_between(BASE, BASE)) < 40


def test_a_patch_is_never_much_larger_than_the_compressed_target() -> None:
    text = Path(__file__).read_bytes()
    for base in (b"", BASE, text[::-1]):
        assert len(patch_between(base, text)) < len(zstd.compress(text, 19)) + 64
        assert len(patch_between(base, BASE[::-1])) < len(BASE) + 64


def test_many_changes_span_several_sections() -> None:
    data = np.frombuffer(random.Random(6).randbytes(10_000_000), np.uint8).copy()
    base = data.tobytes()
    data[::100] += np.uint8(1)
    patch = patch_between(base, data.tobytes())
    assert rebuilt(base, patch, data.tobytes()) == data.tobytes()
    assert {kind.kind: kind.count for kind in delta.inspect(BytesSource(patch)).operations}["control"] > 1


@pytest.mark.xdist_group("retraining")
def test_the_same_pair_gives_the_same_patch(real_models: tuple[Path, Path]) -> None:
    old, new = (path.read_bytes() for path in real_models)
    assert patch_between(BASE, TARGET) == patch_between(BASE, TARGET)
    assert patch_between(old, new) == retraining(*real_models, delta.CODECS[0])


def test_output_comes_in_bounded_pieces() -> None:
    target = bytes(3 * PIECE_BYTES)
    sizes: list[int] = []
    patch = BytesSource(patch_between(target, target))
    delta.apply(BytesSource(target), patch, lambda data: sizes.append(len(data)), target=reference_to(target))
    assert max(sizes) == PIECE_BYTES


def test_applying_needs_little_memory_for_files_far_larger() -> None:
    base, target = Pattern(96 * 2**20, changed=False), Pattern(96 * 2**20, changed=True)
    parts: list[bytes] = []
    made = delta.make(base, target, parts.append)
    patch = BytesSource(b"".join(parts))
    tracemalloc.start()
    try:
        delta.apply(base, patch, lambda data: None, target=made.target)
        applied_with = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
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


def test_an_unknown_codec_cannot_be_made() -> None:
    with pytest.raises(InvalidInput, match="does not speak") as caught:
        patch_between(BASE, TARGET, "tensor-magic.9")
    assert caught.value.field == "codec"


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


def test_a_target_that_only_begins_like_the_ordered_one_is_refused() -> None:
    twin = reference_to(TARGET)
    twin = ArtifactRef(type(twin.digest)(twin.digest[:-1] + ("0" if twin.digest[-1] != "0" else "1")), twin.size)
    with pytest.raises(IntegrityFailure, match="the patch gave"):
        rebuilt(BASE, patch_between(BASE, TARGET), twin)


def test_a_patch_that_writes_wrong_bytes_is_refused() -> None:
    lie = header(b"base", b"wanted") + section(literal(6), b"wronge")
    with pytest.raises(IntegrityFailure, match="the patch gave"):
        rebuilt(b"base", lie, b"wanted")


IMPOSSIBLE = {
    "copy-past-the-base": (section(copy(5)), "outside the base"),
    "copy-before-the-base": (section(copy(2, -1)), "outside the base"),
    "copy-far-away": (section(copy(2, 2**60)), "outside the base"),
    "add-past-the-base": (section(add(5), b"", b"12345"), "outside the base"),
    "nothing": (section(literal(0)), "or nothing"),
    "copy-to-the-end-of-more": (section(copy(0)), "outside the base"),
    "too-long": (section(literal(7), b"1234567"), "more than the target"),
    "too-long-together": (section(copy(4) + copy(4, -4)), "more than the target"),
    "huge": (section(literal(2**60), b"1"), "more than the target"),
    "literals-missing": (section(literal(6), b"123"), "cut off"),
    "literals-left": (section(literal(6), b"1234567"), "unused"),
    "differences-missing": (section(add(4), b"", b"123"), "cut off"),
    "differences-left": (section(add(4), b"", b"12345"), "unused"),
    "payload-left": (section(literal(6), b"123456", b"", b"1"), "unused"),
    "too-short": (section(literal(5), b"12345"), "cut off"),
    "no-operations": (section(b"", b"12"), "without operations"),
    "number-without-end": (section(b"\xff" * 12), "more than 9 bytes"),
    "unknown-flags": (bytes((0b10, 1, 1)) + b"1", "compressed part"),
    "prefix-of-control": (bytes((0b11, 1, 1)) + b"1", "unknown flags"),
    "payload-frame": (bytes((0b10000001, 1, 1)) + b"11", "unknown flags"),
    "too-much-control": (bytes((1,)) + varint(CONTROL_BYTES_MAX + 1), "the limit is"),
    "too-many-literals": (bytes((5,)) + varint(1) + varint(LITERAL_BYTES_MAX + 1), "the limit is"),
    "unknown-method": (section(block(4, 1, method=77), payloads=b"1"), "unknown kind"),
    "unknown-type": (section(block(4, 1, dtype=13), payloads=b"1"), "unknown kind"),
    "unknown-old-type": (section(block(4, 1, old=12), payloads=b"1"), "unknown kind"),
    "large-block": (section(block(ELEMENTS_MAX + 1, 1, old=NO_BASE), payloads=b"1"), "limits"),
    "large-block-of-bytes": (
        section(block(ELEMENTS_MAX, 1, dtype=DType.F64, old=NO_BASE), payloads=b"1"),
        "limits",
    ),
    "uneven-rows": (section(block(4, 1, columns=3), payloads=b"1"), "rows of 3"),
    "large-payload": (section(block(4, PAYLOAD_BYTES_MAX + 1), payloads=b"1"), "limits"),
    "payload-missing": (section(block(4, 2), payloads=b"1"), "limits"),
    "block-past-the-base": (section(block(5, 1), payloads=b"1"), "outside the base"),
    "long-frame": (bytes((0,)) + varint(7) + b"\0" + varint(1) + b"1", "more than the target"),
    "empty-frame": (bytes((0,)) + varint(0) + b"\0" + varint(1) + b"1", "or nothing"),
    "fat-frame": (bytes((0,)) + varint(6) + b"\0" + varint(5_000) + b"1", "more than zstd"),
    "prefix-outside": (bytes((0,)) + varint(6) + b"\1\0\5" + varint(1) + b"1", "outside the base"),
    "prefixes-without-end": (bytes((0,)) + varint(6) + varint(65), "the limit is 64"),
}


@pytest.mark.parametrize(("body", "reason"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_is_refused(body: bytes, reason: str) -> None:
    hostile = header(b"base", b"wanted") + body
    with pytest.raises(IntegrityFailure, match=reason):
        rebuilt(b"base", hostile, b"wanted")
    with pytest.raises(IntegrityFailure, match=reason):
        delta.inspect(BytesSource(hostile))


def test_a_decompression_bomb_is_stopped_at_the_promised_length() -> None:
    window: dict[Any, int] = {zstd.CompressionParameter.window_log: 20}
    compressor = zstd.ZstdCompressor(options=window)
    bomb = b"".join(compressor.compress(bytes(2**20)) for _ in range(400)) + compressor.flush()
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(IntegrityFailure, match=r"compressed part|more than zstd"):
        rebuilt(b"base", with_literal_frame(bomb[4:]), b"wanted")
    with pytest.raises(IntegrityFailure, match="compressed part"):
        rebuilt(b"base", with_literal_frame(bomb[4:1000]), b"wanted")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 64 * 1024


def test_a_frame_with_something_after_it_is_refused() -> None:
    with pytest.raises(IntegrityFailure, match="compressed part"):
        rebuilt(b"base", with_literal_frame(zstd.compress(b"wanted")[4:] + b"more"), b"wanted")


def test_a_frame_that_does_not_end_is_refused() -> None:
    endless = zstd.ZstdCompressor().compress(b"wanted", zstd.ZstdCompressor.FLUSH_BLOCK)
    with pytest.raises(IntegrityFailure, match="compressed part"):
        rebuilt(b"base", with_literal_frame(endless[4:]), b"wanted")


def test_other_files_versions_and_codecs_are_told_apart() -> None:
    patch = patch_between(BASE, TARGET)
    with pytest.raises(IntegrityFailure, match="not a patch"):
        delta.inspect(BytesSource(b"\x80\x02" + patch[2:]))
    with pytest.raises(IntegrityFailure, match="not a patch"):
        delta.inspect(BytesSource(b""))
    with pytest.raises(IntegrityFailure, match="version 9"):
        delta.inspect(BytesSource(patch[:4] + b"\x09" + patch[5:]))
    with pytest.raises(IntegrityFailure, match="codec number 7"):
        delta.inspect(BytesSource(patch[:5] + b"\x07" + patch[6:]))


def test_bytes_after_the_last_section_are_refused() -> None:
    with pytest.raises(IntegrityFailure, match="1 bytes follow"):
        rebuilt(BASE, patch_between(BASE, TARGET) + b"!", TARGET)


def with_literal_frame(frame: bytes) -> bytes:
    """A patch from `base` to `wanted` that promises six literal bytes and has `frame` in their place."""
    flags = bytes((1 | FRAMED << 2,))
    control = literal(6)
    return header(b"base", b"wanted") + flags + varint(len(control)) + varint(6) + varint(len(frame)) + control + frame


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
