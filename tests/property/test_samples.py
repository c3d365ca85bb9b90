"""Samples read back as they were written, and bytes that are none are a named error in little memory."""

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.artifact.samples import (
    HEADER_BYTES_MAX,
    SAMPLES_BYTES_MAX,
    STORED,
    TENSORS_PER_SAMPLE_MAX,
    Sample,
    decode_samples,
    encode_samples,
)
from common.artifact.selftest import SAMPLES_MAX
from common.artifact.tensors import DTYPES, Array
from common.errors import FerryError, IntegrityFailure, InvalidInput, TooLarge

ONE = Sample("cat", {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, {"y": np.array([3], np.int64)})
TEXTS = Sample("text", {"t": np.array([["", "été"]], object)}, {"n": np.array(True)})


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
    kind = draw(st.sampled_from(sorted(DTYPES)))
    if kind != "BYTES":
        return draw(hnp.arrays(DTYPES[kind], shape))
    array = np.empty(shape, object)
    array.ravel()[:] = draw(st.lists(st.text(max_size=4), min_size=array.size, max_size=array.size))
    return array


TENSORS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), arrays())
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,9}", fullmatch=True)
SAMPLES = st.lists(
    st.builds(Sample, NAMES, TENSORS, TENSORS).filter(lambda one: one.inputs or one.outputs),
    max_size=4,
    unique_by=lambda sample: sample.name,
)


@given(SAMPLES)
@example([ONE, TEXTS])
def test_samples_read_back_as_they_were_written(samples: list[Sample]) -> None:
    data = encode_samples(samples)
    found = decode_samples(data)
    assert [sample.name for sample in found] == [sample.name for sample in samples]
    for one, other in zip(samples, found, strict=True):
        for wanted, got in ((one.inputs, other.inputs), (one.outputs, other.outputs)):
            assert sorted(wanted) == sorted(got)
            for name, array in wanted.items():
                assert (got[name].dtype, got[name].shape, got[name].flags.aligned) == (array.dtype, array.shape, True)
                np.testing.assert_array_equal(got[name], array)
    assert encode_samples(found) == data


@pytest.mark.parametrize("samples", [[ONE], [TEXTS], [ONE, TEXTS]])
def test_no_beginning_of_samples_is_taken_for_samples(samples: list[Sample]) -> None:
    data = encode_samples(samples)
    for length in range(len(data)):
        with pytest.raises(IntegrityFailure):
            decode_samples(data[:length])
    with pytest.raises(IntegrityFailure):
        decode_samples(data + b"\0")


@given(st.data())
def test_damaged_samples_are_samples_or_a_named_error(data: st.DataObject) -> None:
    good = bytearray(encode_samples([ONE, TEXTS]))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    read(bytes(good))


@given(st.binary(max_size=200))
def test_any_bytes_are_samples_or_a_named_error(data: bytes) -> None:
    read(data)
    read(len(data).to_bytes(8, "little") + data)


def read(data: bytes) -> None:
    try:
        encode_samples(decode_samples(data))
    except FerryError as error:
        assert "sample" in str(error)


def packed(header: dict[str, Any], payload: bytes = b"") -> bytes:
    encoded = json.dumps({"__metadata__": {"edgeferry.samples": "1"}, **header}).encode()
    return len(encoded).to_bytes(8, "little") + encoded + payload


def entry(dtype: str = "F32", shape: object = (1,), start: int = 0, end: int = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def texts(shape: str, stored: dict[str, Any], payload: bytes) -> bytes:
    """A tensor of strings."""
    return packed({"__metadata__": {"edgeferry.samples": "1", "a/inputs/x": shape}, "a/inputs/x": stored}, payload)


HOSTILE = {
    "a header longer than the file": (2**63).to_bytes(8, "little") + b"{}",
    "a header longer than allowed": (HEADER_BYTES_MAX + 1).to_bytes(8, "little") + b" " * (HEADER_BYTES_MAX + 1),
    "no json": (4).to_bytes(8, "little") + b"\xff\xfe{}",
    "json without end": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "another version": packed({"__metadata__": {"edgeferry.samples": "2"}}),
    "no version": packed({"__metadata__": {}}),
    "a huge shape": packed({"a/inputs/x": entry(shape=[2**31 - 1] * 32)}, bytes(4)),
    "an axis too long": packed({"a/inputs/x": entry(shape=[2**31])}, bytes(4)),
    "too many axes": packed({"a/inputs/x": entry(shape=[1] * 33)}, bytes(4)),
    "an empty tensor that numpy cannot have": packed({"a/inputs/x": entry(shape=[0] + [2**31 - 1] * 9, end=0)}),
    "a negative axis": packed({"a/inputs/x": entry(shape=[-1])}, bytes(4)),
    "an unknown type": packed({"a/inputs/x": entry("BF16", (2,))}, bytes(4)),
    "a wrong type": packed({"a/inputs/x": entry("F64", (1,))}, bytes(4)),
    "bytes beyond the end": packed({"a/inputs/x": entry(end=8, shape=(2,))}, bytes(4)),
    "an end before its start": packed({"a/inputs/x": entry(start=4, end=0, shape=(0,))}, bytes(4)),
    "overlapping tensors": packed({"a/inputs/x": entry(), "a/inputs/y": entry()}, bytes(4)),
    "a gap": packed({"a/inputs/x": entry(start=4, end=8)}, bytes(8)),
    "bytes that are no bool": packed({"a/inputs/x": entry("BOOL", (4,))}, b"\0\1\2\3"),
    "a name with a folder": packed({"../inputs/x": entry()}, bytes(4)),
    "neither input nor output": packed({"a/weights/x": entry()}, bytes(4)),
    "no tensor's name": packed({"a/inputs/": entry()}, bytes(4)),
    "too many samples": packed({f"{n}/inputs/x": entry(shape=(0,), end=0) for n in range(SAMPLES_MAX + 1)}),
    "too many tensors": packed({f"a/inputs/{n}": entry(shape=(0,), end=0) for n in range(TENSORS_PER_SAMPLE_MAX + 1)}),
    "strings of floats": texts("[1]", entry(), bytes(4)),
    "a string cut off": texts("[1]", entry("U8", (4,)), b"\1\0\0\0"),
    "half a length": texts("[1]", entry("U8", (2,), end=2), b"\1\0"),
    "a string that is not utf-8": texts("[1]", entry("U8", (5,), end=5), b"\1\0\0\0\xff"),
    "fewer strings than announced": texts("[2147483647]", entry("U8", (4,)), bytes(4)),
    "strings without a shape": texts("{}", entry("U8", (4,)), bytes(4)),
    "more bytes than allowed": bytes(SAMPLES_BYTES_MAX + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_samples_are_refused_in_little_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityFailure, match="these are no samples"):
            decode_samples(HOSTILE[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * HEADER_BYTES_MAX


def test_samples_that_no_device_would_take_are_not_written() -> None:
    many = [ONE._replace(name=str(number)) for number in range(SAMPLES_MAX + 1)]
    wide = ONE._replace(outputs={str(number): np.zeros(1) for number in range(TENSORS_PER_SAMPLE_MAX)})
    large = ONE._replace(inputs={"x": np.zeros(SAMPLES_BYTES_MAX, np.uint8)})
    for samples in (many, [wide], [large]):
        with pytest.raises(TooLarge):
            encode_samples(samples)
    for sample in (ONE._replace(name="a/b"), ONE._replace(inputs={"x": np.zeros(1, np.complex64)})):
        with pytest.raises(InvalidInput):
            encode_samples([sample])
    with pytest.raises(InvalidInput, match="one name"):
        encode_samples([ONE, ONE])


def test_every_type_of_the_protocol_but_strings_has_one_in_the_container() -> None:
    assert STORED.keys() == DTYPES.keys() - {"BYTES"}
