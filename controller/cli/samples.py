"""What a publisher gives as samples: numpy files, as arrays in the types that the model declares.

One `.npz` holds an array for each tensor, with all samples along a first axis: sample i of an input that the model
declares as [any, 3] is row i of an array [N, 3] (a batch of one), or element i of an array [N, 1, 3]. A folder holds a
`.npz` for each sample, with the arrays exactly as the model takes them; its name is the sample's name. Numbers are
taken over in another width where that loses nothing but a float's precision.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common.artifact import TensorSpec
from common.artifact.selftest import SAMPLES_MAX
from common.artifact.tensors import DTYPES, Array, accepts, describe, in_words
from common.errors import InvalidInput, TooLarge

AUTO_SAMPLES = 4
AUTO_SEED = 0
SUFFIX = ".npz"

Arrays = dict[str, dict[str, Array]]
"""By sample and tensor."""


def read_samples(path: Path, specs: tuple[TensorSpec, ...], field: str, count_max: int = SAMPLES_MAX) -> Arrays:
    """The samples in a `.npz`, or in a folder of them. Only tensors of `specs` may be there. Raises `InvalidInput`."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix == SUFFIX)
        _check_count(len(files), f"{path} has", field, count_max)
        return {file.stem: _as_declared(_load(file, field), specs, field) for file in files}
    return _split(_load(path, field), specs, field, count_max)


def made_up(specs: tuple[TensorSpec, ...], count: int) -> Arrays:
    """Inputs from a fixed seed: numbers around zero, integers 0 and 1 (an index into any table), short words. Open axes
    are 1. They show whether a device computes as the publisher's machine did, not whether it is right.
    """
    _check_count(count, "auto says", "samples")
    chance = np.random.default_rng(AUTO_SEED)
    return {f"auto-{number}": {spec.name: _made_up(spec, chance) for spec in specs} for number in range(count)}


def _made_up(spec: TensorSpec, chance: np.random.Generator) -> Array:
    shape, dtype = tuple(1 if axis < 0 else axis for axis in spec.shape), DTYPES[spec.datatype]
    if dtype.kind == "f":
        return chance.standard_normal(shape).astype(dtype)
    bits = chance.integers(0, 2, shape)
    return np.array(["no", "yes"], object)[bits] if dtype.kind == "O" else bits.astype(dtype)


def _load(path: Path, field: str) -> dict[str, Array]:
    fix = "write it with numpy.savez(path, NAME=array), without Python objects"
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InvalidInput(f"{path} is not an archive of arrays", field=field, fix=fix)
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise InvalidInput(f"cannot read {path}: {error}", field=field, fix=fix) from error


def _split(arrays: Mapping[str, Array], specs: tuple[TensorSpec, ...], field: str, count_max: int) -> Arrays:
    by_name = {spec.name: spec for spec in specs}
    rows = {name: _rows(array, _known(by_name, name, field), f"{field}.{name}") for name, array in arrays.items()}
    counts = {len(some) for some in rows.values()}
    if len(counts) > 1:
        told = ", ".join(f"{name} has {len(some)}" for name, some in rows.items())
        raise InvalidInput(f"not as many samples of each tensor: {told}", field=field, fix="give one of each")
    count = next(iter(counts), 0)
    _check_count(count, "there are", field, count_max)
    singles = ({name: some[number] for name, some in rows.items()} for number in range(count))
    return {str(number): _as_declared(single, specs, field) for number, single in enumerate(singles)}


def _rows(array: Array, spec: TensorSpec, field: str) -> list[Array]:
    """The samples in an array, each of the declared rank."""
    if array.ndim == len(spec.shape) + 1:
        return list(array)
    if array.ndim == len(spec.shape) and spec.shape and spec.shape[0] in {-1, 1}:
        return [array[number : number + 1] for number in range(len(array))]
    wanted = describe(spec)
    fix = f"give the samples along a first axis, each {wanted}"
    raise InvalidInput(f"{list(array.shape)} for {wanted}", field=field, fix=fix)


def _as_declared(arrays: Mapping[str, Array], specs: tuple[TensorSpec, ...], field: str) -> dict[str, Array]:
    by_name = {spec.name: spec for spec in specs}
    return {name: _converted(array, _known(by_name, name, field), f"{field}.{name}") for name, array in arrays.items()}


def _converted(array: Array, spec: TensorSpec, field: str) -> Array:
    dtype = DTYPES[spec.datatype]
    kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b", "O": "U"}[dtype.kind]
    fix = f"give {describe(spec)}, for example array.astype('{'str' if dtype.kind == 'O' else dtype.name}')"
    if array.dtype.kind not in kinds:
        raise InvalidInput(f"{array.dtype} for {describe(spec)}", field=field, fix=fix)
    if dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype.name)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise InvalidInput(f"a value is outside {limits.min} to {limits.max}", field=field, fix=fix)
    converted = array.astype(dtype)
    if not accepts(spec, converted):
        raise InvalidInput(f"{list(array.shape)} for {describe(spec)}", field=field, fix=fix)
    return converted


def _known(specs: Mapping[str, TensorSpec], name: str, field: str) -> TensorSpec:
    if name not in specs:
        raise InvalidInput(f"the model has no {name[:80]!r}", field=field, fix=f"name the arrays {in_words(specs)}")
    return specs[name]


def _check_count(count: int, told: str, field: str, count_max: int = SAMPLES_MAX) -> None:
    if count < 1:
        raise InvalidInput(f"{told} no samples", field=field, fix="give at least one")
    if count > count_max:
        raise TooLarge(f"{told} {count} samples", field=field, fix=f"give at most {count_max}, for example x[:8]")
