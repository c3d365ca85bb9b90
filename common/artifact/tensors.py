"""Arrays against their declared types and shapes, for whoever feeds a model: a device, a publisher, a registry.

Type names are those of the Open Inference Protocol V2 (`FP32`, `INT64`, `BYTES`...). `BF16` is not among them: numpy
has no such type. An axis of -1 is open and takes any length.

    >>> accepts(TensorSpec("x", "FP32", (-1, 4)), np.zeros((2, 4), np.float32))
    True
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.artifact.tensor_spec import TensorSpec
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
        raise InvalidInput("the model has no such input", field=f"inputs.{name}", fix=f"it takes {in_words(wanted)}")
    for spec in specs:
        array = feeds.get(spec.name)
        if array is None:
            raise InvalidInput("this input is missing", field=f"inputs.{spec.name}", fix=f"send {describe(spec)}")
        if not accepts(spec, array):
            got = f"got {datatype_of(array)} {list(array.shape)}"
            raise InvalidInput(got, field=f"inputs.{spec.name}", fix=f"send {describe(spec)}")


class Expected:
    """Declared inputs, made ready to be compared with those of many requests."""

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self._specs = specs
        self._each = tuple((spec, spec.name, DTYPES.get(spec.datatype), _open_first(spec)) for spec in specs)

    def check(self, feeds: Mapping[str, Array]) -> None:
        """As `check_feeds`."""
        if len(feeds) != len(self._each):
            return check_feeds(self._specs, feeds)
        for spec, name, dtype, first in self._each:
            array = feeds.get(name)
            if array is None or array.dtype != dtype or array.ndim != len(spec.shape):
                return check_feeds(self._specs, feeds)
            if array.shape[first:] != spec.shape[first:] and not accepts(spec, array):
                return check_feeds(self._specs, feeds)
        return None


def _open_first(spec: TensorSpec) -> int:
    return 1 if spec.shape and spec.shape[0] == -1 else 0


def accepts(spec: TensorSpec, array: Array) -> bool:
    """Whether `array` has the type and shape that `spec` declares."""
    if array.dtype != DTYPES.get(spec.datatype) or array.ndim != len(spec.shape):
        return False
    return all(axis in (-1, length) for axis, length in zip(spec.shape, array.shape, strict=True))


def describe(spec: TensorSpec) -> str:
    """A declaration in words, for example `FP32 [any, 214]`."""
    return f"{spec.datatype} [{', '.join('any' if axis < 0 else str(axis) for axis in spec.shape)}]"


def in_words(names: Iterable[str]) -> str:
    """Names of tensors as a list for people."""
    return ", ".join(sorted(names))
