"""Small pairs of files, one for each way that a patch can write something, for tests that damage patches.

Each file is the bytes of one tensor; nothing is random but by a seed. `PAIRS` are made once, with every codec.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common import delta
from common.artifact.protobuf import Span
from common.artifact.source import BytesSource
from common.artifact.weights import Weight
from common.delta.operations import Add, Copy, Literal, Operation
from common.delta.sections import write_frame, write_section
from tests.patches import add, copy, header, literal, section

Array = NDArray[Any]


class Pair(NamedTuple):
    """Two files and a patch between them; `kind` is an operation that the patch uses, as `inspect` calls it."""

    name: str
    kind: str
    codec: str
    base: bytes
    target: bytes
    patch: bytes

    @property
    def body(self) -> bytes:
        """The patch without its header."""
        return self.patch[len(header(self.base, self.target, self.codec)) :]

    def __str__(self) -> str:
        return f"{self.name}-{self.codec}"


class _Tensors(NamedTuple):
    old: Array
    new: Array
    old_kind: str | None
    new_kind: str


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _floats(count: int, dtype: type = np.float32) -> Array:
    return _random(1).standard_normal(count).astype(dtype)


def _bucketed() -> _Tensors:
    old = _floats(300)
    return _Tensors(old, (old.view("u4") + _random(2).integers(0, 9, 300, np.uint32)).view("f4"), "F32", "F32")


def _sparse() -> _Tensors:
    old = _floats(2_000)
    new = old.copy()
    new[::97] = _random(3).standard_normal(21)
    return _Tensors(old, new, "F32", "F32")


def _rows() -> _Tensors:
    old = _floats(1_200).reshape(30, 40)
    new = old.copy()
    new[::7] *= np.float32(1.001)
    return _Tensors(old, new, "F32", "F32")


def _mask() -> _Tensors:
    old = _floats(400, np.float16)
    return _Tensors(old, np.where(np.abs(old.astype("f4")) < 0.5, np.float16(0), old), "F16", "F16")


def _low_rank() -> _Tensors:
    old = (_random(4).standard_normal((192, 96)) * 0.05).astype("f4")
    adapter = _random(5).standard_normal((192, 2)) @ _random(6).standard_normal((2, 96)) * 0.01
    return _Tensors(old, old + adapter.astype("f4"), "F32", "F32")


def _guided() -> _Tensors:
    old = _floats(128 * 128, np.float16).reshape(128, 128)
    signs = np.sign(_random(15).standard_normal((128, 2)) @ _random(16).standard_normal((2, 128)))
    # Upwards is away from zero for positive numbers only.
    steps = signs * np.where(old < 0, -1, 1) * _random(17).integers(1, 4, old.shape)
    return _Tensors(old, (old.view("i2") + steps.astype("i2")).view("f2"), "F16", "F16")


def _cast() -> _Tensors:
    old = _floats(600)
    return _Tensors(old, old.astype(np.float16), "F32", "F16")


def _quantised() -> _Tensors:
    old = _floats(600).reshape(20, 30)
    return _Tensors(old, np.rint(old / np.float32(0.03)).clip(-128, 127).astype("i1"), "F32", "I8")


def _difference() -> _Tensors:
    old = _random(7).integers(-99, 99, 500).astype("i1")
    return _Tensors(old, old + _random(8).integers(-2, 3, 500).astype("i1"), "I8", "I8")


def _nibbles() -> _Tensors:
    old = _random(9).integers(0, 256, 300, np.uint8)
    step = _random(10).integers(0, 2, 300, np.uint8)
    return _Tensors(old, (old & 0xF0) | ((old + step) & 15), "I4", "I4")


def _fresh() -> _Tensors:
    return _Tensors(np.zeros(0, "f4"), _floats(400, np.float32) * np.float32(0.02), None, "F32")


_TENSORS: dict[str, tuple[str, Callable[[], _Tensors]]] = {
    "bucketed": ("bucketed", _bucketed),
    "sparse": ("sparse", _sparse),
    "rows": ("rows", _rows),
    "mask": ("mask", _mask),
    "low rank": ("low rank", _low_rank),
    "guided": ("guided", _guided),
    "cast": ("cast", _cast),
    "quantised": ("cast", _quantised),
    "difference": ("difference", _difference),
    "nibbles": ("difference", _nibbles),
    "fresh": ("fresh", _fresh),
}


@cache
def pairs() -> tuple[Pair, ...]:
    """All pairs, always the same and in the same order."""
    return tuple(pair for codec in delta.CODECS for pair in (*_tensor_pairs(codec), *_byte_pairs(codec)))


def _tensor_pairs(codec: str) -> Iterator[Pair]:
    for name, (kind, build) in _TENSORS.items():
        tensors = build()
        base, target = tensors.old.tobytes(), tensors.new.tobytes()
        yield Pair(name, kind, codec, base, target, _made(base, target, tensors, codec))


def _made(base: bytes, target: bytes, tensors: _Tensors, codec: str) -> bytes:
    parts: list[bytes] = []
    old = [_weight(tensors.old_kind, tensors.old)] if tensors.old_kind is not None else []
    new = [_weight(tensors.new_kind, tensors.new)]
    delta.make(BytesSource(base), BytesSource(target), parts.append, codec=codec, base_weights=old, target_weights=new)
    return b"".join(parts)


def _weight(kind: str, values: Array) -> Weight:
    shape = (*values.shape[:-1], 2 * values.shape[-1]) if kind == "I4" else values.shape
    return Weight("w", kind, shape, Span(0, values.nbytes))


def _byte_pairs(codec: str) -> Iterator[Pair]:
    """Without tensors: each operation by hand, then what `make` finds."""
    base = _random(11).bytes(700)
    text = b"".join(b"node %d: Conv of input %d\n" % (number, number // 3) for number in range(60))
    source = BytesSource(base)

    def by_hand(kind: str, target: bytes, body: bytes, name: str = "") -> Pair:
        return Pair(name or kind, kind, codec, base, target, header(base, target, codec) + body)

    yield by_hand("copy", base[5:] + base[:9], section(copy(695, 5) + copy(9, -700)))
    yield by_hand("literal", b"new" + base[3:], section(literal(3) + copy(0), b"new"))
    yield by_hand("add", bytes(byte ^ 1 for byte in base), _added(base))
    content = text + base[100:600]
    yield by_hand("frame", content, write_frame(content, source.read_at, (Span(90, 640),)), "frame with a prefix")
    yield by_hand("frame", text, write_frame(text, source.read_at, ()))
    yield from _written(codec)
    target = text[:900] + base + text[900:]
    parts: list[bytes] = []
    delta.make(BytesSource(text[::2] + base), BytesSource(target), parts.append, codec=codec)
    yield Pair("text", "copy", codec, text[::2] + base, target, b"".join(parts))


def _written(codec: str) -> Iterator[Pair]:
    """Sections whose streams are short only as frames of one kind or another."""
    base = _random(12).bytes(3_000)
    differences = np.where(_random(13).random(3_000) < 0.02, _random(14).integers(0, 256, 3_000), 0).astype(np.uint8)
    words = b"".join(b"layer%d/%s/weight " % (number, _random(number).bytes(2).hex().encode()) for number in range(70))
    names = words.replace(b"weight", b"bias")
    every_fifth: list[Operation] = []
    for place in range(0, 600, 5):
        every_fifth += [Literal(base[place : place + 1]), Copy(place + 1, 4)]
    ways: dict[str, tuple[str, bytes, bytes, list[Operation]]] = {
        "packed differences": (
            "add", base, (np.frombuffer(base, np.uint8) + differences).tobytes(), [Add(0, differences.tobytes())],
        ),
        "literals with a prefix": ("literal", words, names, [Literal(names)]),
        "literals in a frame": ("literal", b"", words, [Literal(words)]),
        "many operations": ("copy", base[:600], base[:600], every_fifth),
    }  # fmt: skip
    for name, (kind, old, new, operations) in ways.items():
        body = write_section(operations, 0, len(new), BytesSource(old))
        yield Pair(name, kind, codec, old, new, header(old, new, codec) + body)


def _added(base: bytes) -> bytes:
    differences = bytes(((byte ^ 1) - byte) % 256 for byte in base)
    return section(add(len(base)), differences=differences)
