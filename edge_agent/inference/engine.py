"""The port to the thing that runs models: an engine loads a file into a session, a session turns arrays into arrays.

Sessions are called from several threads at once and never change once loaded, so a swap is a new session beside the old
one. Nothing here knows about versions, requests or ONNX Runtime; `edge_agent.inference.ort` is the adapter, and the
tests bring sessions that misbehave on purpose.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from common.artifact import TensorSpec
from common.artifact.tensors import Array
from common.errors import FerryError


class EngineFailure(FerryError):
    """The engine could not load a model or raised while running it. The message is the engine's own."""

    code = "engine_failure"


class Session(Protocol):
    """One model, loaded. `run` may be called by several threads at once; `close` only when no `run` is left."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """The named outputs for `feeds` (input name to array), or `EngineFailure`."""
        ...

    def stop(self, thread: int) -> None:
        """Let the `run` that `thread` (see `threading.get_ident`) is in end soon, with `EngineFailure`, if it can."""
        ...

    def close(self) -> None:
        """Give the memory back; the session cannot be used afterwards."""
        ...


class Beside(NamedTuple):
    """What belongs to a model file: shared libraries with operators, and a name for all its bytes, if it is known."""

    libraries: tuple[Path, ...] = ()
    identity: str = ""


NOTHING = Beside()


class Engine(Protocol):
    """What loads sessions."""

    platform: str
    """The engine's name in the Open Inference Protocol's model metadata, for example `onnxruntime_onnx`."""

    def load(self, path: Path, beside: Beside = NOTHING) -> Session:
        """A session for the model file at `path`. Slow (it may take seconds), and it does not hold up other threads.

        Raises `EngineFailure` for a file that is not a model or that the engine cannot run, `NotFound` when there is no
        file, and `Unavailable` when memory ran out, which says nothing about the model. `Forbidden` when libraries are
        not allowed here.
        """
        ...

    def doubt(self, path: Path) -> bool:
        """What was loaded from `path` last failed its checks: whether it would be loaded in another way from now on."""
        ...
