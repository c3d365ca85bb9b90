"""External data: the weights that an ONNX file keeps in files beside it.

A tensor names such a file (`location`), the byte it begins at and how many bytes it has. All of it comes from a
stranger, and the names become file names on devices, so only plain names pass, every file that is named must be given
and every given one must be named, and each tensor must lie inside its file. The files themselves are never read.

Source: onnx/onnx.proto (TensorProto.external_data) and docs/ExternalData.md of the ONNX project. Without an offset a
tensor begins at 0; without a length it reaches to the end of its file.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from common.artifact.manifest import FILE_NAME, FILES_PER_VARIANT_MAX
from common.artifact.protobuf import Span
from common.errors import InvalidInput

FIX_PLAIN_NAME = (
    "save the model again with the data file in the same folder, under a name of letters, digits, '.', '_', '-'"
)
FIX_ONE_FILE = "save the weights in one file: onnx.save_model(model, path, save_as_external_data=True)"


class ExternalTensor(NamedTuple):
    """Where a tensor's bytes lie: `length` bytes (None: all that follow) of the file `location` from `offset` on."""

    name: str
    location: str
    offset: int
    length: int | None


def data_files(tensors: Iterable[ExternalTensor]) -> tuple[str, ...]:
    """The names of the files that the tensors lie in, sorted; `InvalidInput` for one that is no plain file name."""
    names = sorted({tensor.location for tensor in tensors})
    for name in names:
        if not re.fullmatch(FILE_NAME, name):
            raise InvalidInput(f"external data in {name[:80]!r}", field="model", fix=FIX_PLAIN_NAME)
    if len(names) >= FILES_PER_VARIANT_MAX:
        problem = f"{len(names)} files of external data, at most {FILES_PER_VARIANT_MAX - 1} are possible"
        raise InvalidInput(problem, field="model", fix=FIX_ONE_FILE)
    return tuple(names)


def data_spans(tensors: Iterable[ExternalTensor], sizes: Mapping[str, int]) -> dict[str, tuple[Span, ...]]:
    """Where the tensors lie in each of the given files; `sizes` are the lengths of these in bytes, by name.

    `InvalidInput` when the files are not exactly those that the tensors name, or a tensor does not lie in its file.
    """
    placed = list(tensors)
    needed = data_files(placed)
    for name in needed:
        if name not in sizes:
            raise InvalidInput(f"the weights in {name!r} are missing", field="model", fix=f"give {name!r} as well")
    for name in sorted(sizes):
        if name not in needed:
            raise InvalidInput(f"the model does not name the file {name[:80]!r}", field="model", fix="leave it out")
    spans: dict[str, list[Span]] = {name: [] for name in needed}
    for tensor in placed:
        spans[tensor.location].append(_span(tensor, sizes[tensor.location]))
    return {name: tuple(sorted(found)) for name, found in spans.items()}


def _span(tensor: ExternalTensor, size: int) -> Span:
    end = size if tensor.length is None else tensor.offset + tensor.length
    if tensor.offset > size or end > size:
        problem = f"tensor {tensor.name!r} reaches to byte {max(end, tensor.offset)} of {tensor.location!r}"
        fix = f"the file has {size} bytes; give the one that was saved with this model"
        raise InvalidInput(problem, field="model", fix=fix)
    return Span(tensor.offset, end)
