"""What uploaded files are: the ONNX file of a build, the data files that it names, and the parts of each.

Files are read where they lie, tensors by their places only; what is wrong with them is said of the build
(`variants.NAME`) or of the file (`variants.NAME.FILE`) that the publisher named. Small files get no list of parts: it
would hardly be smaller than what it saves.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from common.artifact.external import data_spans
from common.artifact.manifest import ArtifactRef, Variant
from common.artifact.onnx_io import OnnxSignature, read_signature
from common.artifact.parts import cut, encode_index, index_of
from common.artifact.protobuf import Span
from common.errors import InvalidInput
from common.filesource import FileSource
from common.ids import Digest

MODEL_SUFFIX = ".onnx"
PARTED_BYTES_MIN = 64 * 1024
"""Files smaller than this have no list of parts."""


class Build(msgspec.Struct, frozen=True):
    """A build as its files say, and for each of them where its tensors' bytes lie."""

    variant: Variant
    tensors: dict[Digest, tuple[Span, ...]]


def inspect_build(name: str, files: Mapping[str, Digest], path_of: Callable[[Digest, str], Path]) -> Build:
    """What the build `name` is, made of `files`; `path_of` finds a blob (and is told the field, for its error).

    `InvalidInput` when there is no single ONNX file among them, when it cannot be served, or when the others are not
    exactly the files that it keeps weights in.
    """
    field = f"variants.{name}"
    model = _model_name(files, field)
    paths = {file: path_of(digest, f"{field}.{file}") for file, digest in files.items()}
    references = {file: ArtifactRef(digest, paths[file].stat().st_size) for file, digest in files.items()}
    signature = _signature(paths[model], f"{field}.{model}")
    sizes = {file: reference.size for file, reference in references.items() if file != model}
    try:
        spans = data_spans(signature.external, sizes)
    except InvalidInput as error:
        raise InvalidInput(error.message, field=field, fix=error.fix) from error
    return Build(
        Variant(references, model, signature.inputs, signature.outputs),
        {files[file]: places for file, places in {**spans, model: signature.payloads}.items()},
    )


def parts_of(path: Path, tensors: Sequence[Span]) -> bytes | None:
    """The list of the parts of a file, encoded; None when it is too small for one. Reads and hashes all of it."""
    with FileSource(path) as source:
        if source.size < PARTED_BYTES_MIN:
            return None
        return encode_index(index_of(source, cut(tensors, source.size)))


def _model_name(files: Mapping[str, Digest], field: str) -> str:
    if len(files) == 1:
        return next(iter(files))
    models = [file for file in files if file.endswith(MODEL_SUFFIX)]
    if len(models) != 1:
        fix = f"give one file that ends in {MODEL_SUFFIX}, and the data files that it names"
        raise InvalidInput(f"{len(models)} ONNX files among {len(files)}", field=field, fix=fix)
    return models[0]


def _signature(path: Path, field: str) -> OnnxSignature:
    try:
        with FileSource(path) as source:
            return read_signature(source)
    except InvalidInput as error:
        raise InvalidInput(error.message, field=field, fix=error.fix) from error
