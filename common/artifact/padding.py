"""Whether a release's padding fits its model, for whoever signs a release or serves one."""

from collections.abc import Iterable, Mapping

import numpy as np

from common.artifact.serving import Padding
from common.artifact.tensor_spec import TensorSpec
from common.artifact.tensors import DTYPES, describe, in_words
from common.errors import InvalidInput


def check_padding(padding: Mapping[str, Padding], inputs: Iterable[TensorSpec], field: str = "padding") -> None:
    """Raise `InvalidInput`, below `field`, unless the inputs are there and open where they are padded."""
    specs = {spec.name: spec for spec in inputs}
    for name, one in padding.items():
        where = f"{field}.{name}"
        _check_axis(specs, name, one.axis, where)
        if not _fits(one.value, DTYPES[specs[name].datatype]):
            fix = f"give a value that {specs[name].datatype} can hold"
            raise InvalidInput(f"cannot pad with {one.value!r:.40}", field=f"{where}.value", fix=fix)
        if one.mask is not None:
            _check_mask(specs, padding, one.mask, one.axis, f"{where}.mask")


def _check_mask(
    specs: Mapping[str, TensorSpec], padding: Mapping[str, Padding], mask: str, axis: int, field: str
) -> None:
    _check_axis(specs, mask, axis, field)
    if mask in padding:
        fix = "a mask is padded with zeros: say nothing else about it"
        raise InvalidInput(f"{mask!r} has a padding of its own", field=field, fix=fix)
    if specs[mask].datatype == "BYTES":
        raise InvalidInput(f"{mask!r} holds strings", field=field, fix="name an input of numbers")


def _check_axis(specs: Mapping[str, TensorSpec], name: str, axis: int, field: str) -> None:
    spec = specs.get(name)
    if spec is None:
        raise InvalidInput(f"the model has no input {name[:80]!r}", field=field, fix=f"it takes {in_words(specs)}")
    if not spec.shape or spec.shape[0] != -1:
        fix = "only models whose first axis is open run requests together"
        raise InvalidInput(f"the first axis of {describe(spec)} is fixed", field=field, fix=fix)
    if axis >= len(spec.shape) or spec.shape[axis] != -1:
        where = [str(at) for at, length in enumerate(spec.shape) if at and length == -1]
        fix = f"open axes of {name!r} after the first: {', '.join(where) or 'none'}"
        raise InvalidInput(f"axis {axis} is not open in {describe(spec)}", field=f"{field}.axis", fix=fix)


def _fits(value: bool | float | str, dtype: "np.dtype[np.generic]") -> bool:
    if dtype.kind == "O" or isinstance(value, str):
        return dtype.kind == "O" and isinstance(value, str)
    if dtype.kind == "b":
        return value in (0, 1)
    if isinstance(value, bool):
        return False
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return bool(np.isfinite(np.asarray(value, np.float64).astype(dtype)))
    limits = np.iinfo(dtype.name)
    return float(value).is_integer() and limits.min <= value <= limits.max
