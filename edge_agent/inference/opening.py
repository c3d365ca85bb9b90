"""From a release's files to a session with the tensors that callers see: a model and the steps around it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from common.artifact import TensorSpec
from common.artifact.pipeline import Pipeline
from common.artifact.tensors import Array
from common.pipelines import Guard
from edge_agent.inference.engine import NOTHING, Beside, Session
from edge_agent.inference.pipeline import PipelineSession
from edge_agent.inference.tensors import synthetic
from edge_agent.inference.timelimit import stopped_after

Load = Callable[[Path], Session]
"""Makes a session of a model file, as `Engine.load` does."""


class Extras(NamedTuple):
    """What a release has besides its model: steps, and what the engine needs (libraries, a name for all files)."""

    pipeline: Pipeline | None = None
    beside: Beside = NOTHING


class Opened(NamedTuple):
    """A session; a valid input of the smallest size; whether rows may be joined, as far as its steps say."""

    session: Session
    example: Mapping[str, Array]
    row_wise: bool = True


def open_release(
    load: Load, path: Path, inputs: tuple[TensorSpec, ...], pipeline: Pipeline | None, run_s_max: float
) -> Opened:
    """The model at `path`, as `load` makes it, with its steps, which get `run_s_max` seconds to be opened.

    Raises what `Engine.load` raises, and `PluginMissing`.
    """
    session = load(path)
    if pipeline is None:
        return Opened(session, synthetic(inputs))
    try:
        guard = Guard()
        with stopped_after(run_s_max, guard.stop):
            piped = PipelineSession(session, pipeline, inputs, guard)
            example = synthetic(inputs) | piped.example()
    except BaseException:
        session.close()
        raise
    return Opened(piped, example, piped.row_wise)
