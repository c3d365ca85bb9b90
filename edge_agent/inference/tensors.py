"""Tensors against their declared shapes and types: pure rules that the engine, the server and the protocol share.

Type names are those of the Open Inference Protocol V2 (`FP32`, `INT64`, `BYTES`...). `BF16` is not among them: numpy
has no such type. An axis of -1 is open and takes any length.

    >>> accepts(TensorSpec("x", "FP32", (-1, 4)), np.zeros((2, 4), np.float32))
    True
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.artifact import TensorSpec
from common.errors import InvalidInput

Array = NDArray[Any]
"""One tensor; strings (`BYTES`) are object arrays of `str`."""

DTYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
}
"""Protocol type to numpy type; `BYTES` are object arrays of `str`."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def datatype_of(array: Array) -> str:
    """The protocol's name for the type of `array`."""
    return _NAMES.get(array.dtype) or str(array.dtype)


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Mapping[str, Array]) -> None:
    """Raise `InvalidInput` unless `feeds` holds every declared input in its type and shape, and nothing else."""
    wanted = {spec.name for spec in specs}
    for name in feeds.keys() - wanted:
        raise InvalidInput("the model has no such input", field=f"inputs.{name}", fix=f"it takes {_names(wanted)}")
    for spec in specs:
        array = feeds.get(spec.name)
        if array is None:
            raise InvalidInput("this input is missing", field=f"inputs.{spec.name}", fix=f"send {describe(spec)}")
        if not accepts(spec, array):
            got = f"got {datatype_of(array)} {list(array.shape)}"
            raise InvalidInput(got, field=f"inputs.{spec.name}", fix=f"send {describe(spec)}")


def check_outputs(specs: tuple[TensorSpec, ...], wanted: Iterable[str]) -> None:
    """Raise `InvalidInput` if a wanted output is not among `specs`."""
    known = {spec.name for spec in specs}
    for name in wanted:
        if name not in known:
            raise InvalidInput("the model has no such output", field=f"outputs.{name}", fix=f"it has {_names(known)}")


def accepts(spec: TensorSpec, array: Array) -> bool:
    """Whether `array` has the type and shape that `spec` declares."""
    if array.dtype != DTYPES.get(spec.datatype) or array.ndim != len(spec.shape):
        return False
    return all(axis in (-1, length) for axis, length in zip(spec.shape, array.shape, strict=True))


def describe(spec: TensorSpec) -> str:
    """A declaration in words, for example `FP32 [any, 214]`."""
    return f"{spec.datatype} [{', '.join('any' if axis < 0 else str(axis) for axis in spec.shape)}]"


def mismatch(promised: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]) -> str | None:
    """How the tensors `found` in a session differ from those `promised` by the manifest, or None when they agree.

    An axis agrees when both lengths are equal or one side leaves it open: an engine may infer a shape that the file
    leaves open. The order does not matter.
    """
    by_name = {spec.name: spec for spec in found}
    for spec in promised:
        other = by_name.pop(spec.name, None)
        if other is None:
            return f"{spec.name!r} is in the manifest and not in the model"
        if spec.datatype != other.datatype or not _shapes_agree(spec.shape, other.shape):
            return f"{spec.name!r} is {describe(other)} in the model and {describe(spec)} in the manifest"
    return f"{next(iter(by_name))!r} is in the model and not in the manifest" if by_name else None


def synthetic(specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """The smallest valid input: open axes are 1, numbers 0, strings empty. A zero is a valid index of any table."""
    feeds: dict[str, Array] = {}
    for spec in specs:
        shape = tuple(1 if axis < 0 else axis for axis in spec.shape)
        feeds[spec.name] = (
            np.full(shape, "", object) if spec.datatype == "BYTES" else np.zeros(shape, DTYPES[spec.datatype])
        )
    return feeds


def non_finite(outputs: Mapping[str, Array]) -> str | None:
    """The name of the first float output that holds a NaN or an infinity, or None."""
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return name
    return None


def _shapes_agree(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
