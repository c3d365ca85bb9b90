"""What a variant may have besides model and weights: steps around the model, and libraries with operators.

Nothing is run in the controller, and plug-ins are not installed there; what can be known without is refused here: types
that devices do not serve, tensors that no step can have changed, files that are no shared library.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec.structs import replace

from common.artifact import ArtifactRef, TensorSpec, Variant
from common.artifact.elf import HEADER_BYTES, machine_of
from common.artifact.pipeline import Pipeline
from common.artifact.tensors import DTYPES, in_words
from common.errors import InvalidInput
from common.ids import Digest
from controller.resources import GivenPipeline

Pipelines = Mapping[str, GivenPipeline]
"""By variant."""
CustomOps = Mapping[str, Mapping[str, Digest]]
"""By variant and file name."""


def with_pipeline(variant: Variant, given: GivenPipeline, field: str) -> Variant:
    """The variant behind its steps: callers see the given tensors. `InvalidInput`, below `field`."""
    if not given.before and not given.after:
        raise InvalidInput("there is no step", field=field, fix="leave the pipeline out")
    for kind, specs, steps, own in (
        ("inputs", given.inputs, given.before, variant.inputs),
        ("outputs", given.outputs, given.after, variant.outputs),
    ):
        _check_specs(specs, f"{field}.{kind}")
        if not steps and specs != own:
            raise InvalidInput("no step changes them", field=f"{field}.{kind}", fix="give those of the model")
    pipeline = Pipeline(
        model_inputs=variant.inputs, model_outputs=variant.outputs, before=given.before, after=given.after
    )
    return replace(variant, inputs=given.inputs, outputs=given.outputs, pipeline=pipeline)


def with_custom_ops(
    variant: Variant, given: Mapping[str, Digest], path_of: Callable[[Digest, str], Path], field: str
) -> Variant:
    """The variant with libraries as files more; `InvalidInput`, below `field`."""
    files = dict(variant.files)
    for name, digest in given.items():
        if name in files:
            raise InvalidInput(f"two files are called {name}", field=field, fix="give one of them another name")
        path = path_of(digest, f"{field}.{name}")
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        try:
            machine_of(header)
        except InvalidInput as error:
            raise InvalidInput(error.message, field=f"{field}.{name}", fix=error.fix) from error
        files[name] = ArtifactRef(digest, path.stat().st_size)
    return replace(variant, files=files, custom_ops=tuple(sorted(given)))


def _check_specs(specs: tuple[TensorSpec, ...], field: str) -> None:
    if not specs or len({spec.name for spec in specs}) != len(specs):
        raise InvalidInput("there is none, or one twice", field=field, fix="declare each tensor once")
    for spec in specs:
        if spec.datatype not in DTYPES or any(axis < -1 for axis in spec.shape):
            fix = f"types are {in_words(DTYPES)}; an axis is a length, or -1 for any"
            raise InvalidInput(f"{spec.datatype[:40]} {list(spec.shape)}", field=f"{field}.{spec.name[:80]}", fix=fix)
