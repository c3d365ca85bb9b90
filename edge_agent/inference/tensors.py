"""A model's tensors as its manifest declares them: pure rules that the engine, the server and the trial share.

What a single array must be is said in `common.artifact.tensors`.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from common.artifact import TensorSpec
from common.artifact.tensors import DTYPES, Array, describe, in_words
from common.errors import InvalidInput


def check_outputs(specs: tuple[TensorSpec, ...], wanted: Iterable[str]) -> None:
    """Raise `InvalidInput` if a wanted output is not among `specs`."""
    known = {spec.name for spec in specs}
    for name in wanted:
        if name not in known:
            raise InvalidInput("the model has no such output", field=f"outputs.{name}", fix=f"it has {in_words(known)}")


def bytes_of(arrays: Iterable[Array]) -> int:
    """What `arrays` take in memory; of strings their characters too."""
    return sum(array.nbytes + (sum(map(len, array.flat)) if array.dtype == np.object_ else 0) for array in arrays)


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


def made_up(specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """An input that tells answers apart, always the same: numbers around zero, integers 0 and 1, short words."""
    chance = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for spec in specs:
        shape, dtype = tuple(1 if axis < 0 else axis for axis in spec.shape), DTYPES[spec.datatype]
        if dtype.kind == "f":
            feeds[spec.name] = chance.standard_normal(shape).astype(dtype)
            continue
        bits = chance.integers(0, 2, shape)
        feeds[spec.name] = np.array(["no", "yes"], object)[bits] if dtype.kind == "O" else bits.astype(dtype)
    return feeds


def non_finite(outputs: Mapping[str, Array]) -> str | None:
    """The name of the first float output that holds a NaN or an infinity, or None."""
    for name, array in outputs.items():
        # Counting takes half the time of all(): this is part of every request.
        if array.dtype.kind == "f" and np.count_nonzero(np.isfinite(array)) < array.size:
            return name
    return None


def _shapes_agree(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))
