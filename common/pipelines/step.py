"""What a plug-in brings: a function that opens a step, and the step that arrays go through.

A step takes some of the tensors that there are at its place and puts others there instead; the rest passes it by. Steps
are called from several threads at once and keep nothing from one request to the next. The arrays that they get are
read-only.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from common.artifact.tensor_spec import TensorSpec
from common.artifact.tensors import Array
from common.errors import FerryError


class PluginMissing(FerryError):
    """This machine has not the code that a step needs; installing it would mend that."""

    code = "plugin_missing"


class StepFailed(FerryError):
    """A step could not be opened, raised, answered otherwise than it declares, or took too long: it is at fault."""

    code = "step_failed"


class Step(Protocol):
    """An open step. `inputs` are the tensors that it takes, `outputs` those that it puts in their place.

    Two attributes may be there besides: `row_wise`, true when every row (along the first axis) of what it puts there
    depends on that row of what it takes alone; and `example()`, a mapping with a valid array for each of `inputs`, for
    a step that refuses zeros.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def apply(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """One array for each of `outputs`, from one for each of `inputs`.

        `InvalidInput` says that the caller sent something useless; it does not speak against the release.
        """
        ...


class OpenStep(Protocol):
    """What an entry point names."""

    def __call__(self, parameters: Mapping[str, Any], inputs: tuple[TensorSpec, ...]) -> Step:
        """A step for a place where there are the tensors `inputs`. `InvalidInput` names a parameter that cannot be."""
        ...
