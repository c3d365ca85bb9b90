"""The parameters of the agent's own steps: a struct each, filled from JSON, and the tensor that a step is for."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from common.artifact.tensor_spec import TensorSpec
from common.artifact.tensors import in_words
from common.errors import InvalidInput

S = TypeVar("S", bound=msgspec.Struct)


def parse(struct: type[S], parameters: Mapping[str, Any]) -> S:
    """The parameters as `struct`; `InvalidInput` names what is wrong with them."""
    try:
        return msgspec.convert(parameters, type=struct)
    except msgspec.ValidationError as error:
        raise InvalidInput(str(error), field="parameters") from error


def pick(specs: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    """The tensor `name`; if that is empty, the only one there is."""
    if not name and len(specs) == 1:
        return specs[0]
    for spec in specs:
        if spec.name == name:
            return spec
    message = f"there is no {name!r}" if name else "it is not said which"
    raise InvalidInput(message, field="parameters.input", fix=f"name one of {in_words(one.name for one in specs)}")
