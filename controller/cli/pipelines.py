"""`--pipeline FILE`: the steps of a release from TOML, opened here as a device will open them.

The plug-ins must be installed where a release with them is published: their steps say what tensors come out, a
self-test goes through them, and their version and the digest of their code are taken from here unless the file says so.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from common.artifact import TensorSpec
from common.artifact.pipeline import BUILT_IN_PREFIX, PipelineStep
from common.artifact.tensors import DTYPES, in_words
from common.errors import InvalidInput, NotFound
from common.pipelines import Chain, Guard, PluginMissing, StepFailed, open_chain
from common.pipelines.installed import code_of, digest_of_plugin, find_plugin
from controller.resources import GivenPipeline

FILE_BYTES_MAX = 256 * 1024


class GivenStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step as it is written; without `version` and `code` those of the plug-in installed here."""

    plugin: str
    version: str = ""
    code: tuple[str, ...] = ()
    parameters: dict[str, Any] = {}


class GivenInput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tensor that callers send."""

    name: Annotated[str, Meta(min_length=1)]
    datatype: str
    shape: tuple[Annotated[int, Meta(ge=-1)], ...]


class PipelineFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pipeline file. `inputs` are what callers send; without steps before the model they are the model's."""

    inputs: tuple[GivenInput, ...] = ()
    before: tuple[GivenStep, ...] = ()
    after: tuple[GivenStep, ...] = ()


class PipelineDraft(NamedTuple):
    """The open steps before and after a model, and what is published of them."""

    before: Chain
    after: Chain
    given: GivenPipeline


def read_pipeline(path: Path) -> PipelineFile:
    """The file at `path`; `InvalidInput` names what is wrong with it."""
    try:
        data = path.read_bytes()
        if len(data) > FILE_BYTES_MAX:
            raise InvalidInput(f"{len(data)} bytes", field=str(path), fix=f"at most {FILE_BYTES_MAX}")
        return msgspec.toml.decode(data, type=PipelineFile)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", field="pipeline") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fix = "see docs/reference/pipeline-file.md"
        raise InvalidInput(str(error), field=str(path), fix=fix) from error


def files_by_variant(options: Iterable[str], variants: Iterable[str], what: str) -> dict[str, tuple[Path, ...]]:
    """`FILE` for all variants, and `VARIANT=FILE` for one, as files by variant."""
    found: dict[str, tuple[Path, ...]] = dict.fromkeys(variants, ())
    for text in options:
        name, equals, path = text.partition("=")
        chosen = [name] if equals and name in found else list(found)
        file = Path(path if chosen == [name] and equals else text)
        if not file.is_file():
            raise InvalidInput(f"there is no file {file}", field=what, fix="write FILE or VARIANT=FILE")
        for variant in chosen:
            found[variant] = (*found[variant], file)
    return {name: files for name, files in found.items() if files}


def open_pipeline(
    file: PipelineFile, model_inputs: tuple[TensorSpec, ...], model_outputs: tuple[TensorSpec, ...]
) -> PipelineDraft:
    """The steps around a model with these tensors. Raises `InvalidInput`."""
    before, after = (tuple(map(_pinned, steps)) for steps in (file.before, file.after))
    inputs = _inputs(file, model_inputs)
    guard = Guard()
    try:
        first = open_chain(before, inputs, code_of, guard)
        second = open_chain(after, model_outputs, code_of, guard)
    except (StepFailed, PluginMissing) as error:
        raise InvalidInput(str(error), field="pipeline") from error
    _check_fit(first.outputs, model_inputs)
    given = GivenPipeline(before=before, after=after, inputs=inputs, outputs=second.outputs)
    return PipelineDraft(first, second, given)


def _inputs(file: PipelineFile, model_inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    if not file.before:
        if file.inputs:
            raise InvalidInput("no step comes before the model", field="inputs", fix="leave [[inputs]] out")
        return model_inputs
    if not file.inputs:
        raise InvalidInput("it is not said what callers send", field="inputs", fix="declare them with [[inputs]]")
    for spec in file.inputs:
        if spec.datatype not in DTYPES:
            raise InvalidInput(spec.datatype, field=f"inputs.{spec.name}.datatype", fix=f"one of {in_words(DTYPES)}")
    return tuple(TensorSpec(spec.name, spec.datatype, spec.shape) for spec in file.inputs)


def _pinned(step: GivenStep) -> PipelineStep:
    version, code = step.version, step.code
    try:
        if not step.plugin.startswith(BUILT_IN_PREFIX) and not (version and code):
            plugin = find_plugin(step.plugin)
            version, code = version or plugin.version, code or (digest_of_plugin(plugin),)
        written = {"plugin": step.plugin, "version": version, "code": code, "parameters": step.parameters}
        return msgspec.convert(written, type=PipelineStep)
    except NotFound as error:
        raise InvalidInput(error.message, field=f"pipeline.{step.plugin}", fix=error.fix) from error
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidInput(str(error), field=f"pipeline.{step.plugin[:80]}") from error


def _check_fit(made: tuple[TensorSpec, ...], model_inputs: tuple[TensorSpec, ...]) -> None:
    """Before anything is uploaded: what comes out of the steps is what the model takes."""
    by_name: Mapping[str, TensorSpec] = {spec.name: spec for spec in made}
    for spec in model_inputs:
        found = by_name.get(spec.name)
        if found is None or found.datatype != spec.datatype or len(found.shape) != len(spec.shape):
            there = ", ".join(f"{one.name} {one.datatype} {list(one.shape)}" for one in made)
            wanted = f"{spec.name} {spec.datatype} {list(spec.shape)}"
            raise InvalidInput(f"the model takes {wanted}, the steps make {there}", field="pipeline.before")
    if extra := by_name.keys() - {spec.name for spec in model_inputs}:
        fix = "let a step take it, or do not declare it"
        raise InvalidInput(f"the model takes no {in_words(extra)}", field="pipeline.before", fix=fix)
