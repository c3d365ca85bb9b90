"""A model with its steps as one session: callers, self-tests, probation and batching see nothing but its outer tensors.

The model's own tensors are held against the manifest and against what the steps make before anything is run. A step
that fails is `EngineFailure`, as if the model had failed; what a step calls the caller's fault stays `InvalidInput`.
"""

from collections.abc import Mapping, Sequence

from common.artifact import TensorSpec
from common.artifact.pipeline import Pipeline
from common.artifact.tensors import Array
from common.pipelines import Chain, Guard, StepFailed, open_chain
from common.pipelines.installed import code_of
from edge_agent.inference.engine import EngineFailure, Session
from edge_agent.inference.tensors import mismatch, non_finite


class PipelineSession:
    """`session`, which has the tensors that `pipeline` says, between its steps. `inputs` are those of the first step.

    Imports and opens the steps. Raises `EngineFailure` (they do not fit, or fail) and `PluginMissing`.
    """

    def __init__(self, session: Session, pipeline: Pipeline, inputs: tuple[TensorSpec, ...], guard: Guard) -> None:
        self._session = session
        self._model_outputs = [spec.name for spec in pipeline.model_outputs]
        self._guard = guard
        try:
            self._before = open_chain(pipeline.before, inputs, code_of, guard)
            self._after = open_chain(pipeline.after, pipeline.model_outputs, code_of, guard)
        except StepFailed as error:
            raise EngineFailure(str(error)) from error
        _check_joint("the model takes", pipeline.model_inputs, session.inputs)
        _check_joint("the model answers", pipeline.model_outputs, session.outputs)
        _check_joint("the steps before the model make", pipeline.model_inputs, self._before.outputs)
        self.inputs = inputs
        self.outputs = self._after.outputs

    @property
    def row_wise(self) -> bool:
        """Whether the steps treat rows one by one."""
        return self._before.row_wise and self._after.row_wise

    def example(self) -> dict[str, Array]:
        """Valid arrays for some inputs, from steps that know better than zeros. Raises `EngineFailure`."""
        try:
            return self._before.example()
        except StepFailed as error:
            raise EngineFailure(str(error)) from error

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """See `Session.run`. What is not finite behind the model counts as in any answer, whatever the steps do."""
        fed = self._through(self._before, feeds)
        raw = self._session.run(fed, self._model_outputs)
        flaw = non_finite(raw)
        if flaw:
            raise EngineFailure(f"the model answered with a NaN or an infinity in {flaw!r}")
        found = self._through(self._after, raw)
        return {name: found[name] for name in outputs}

    def stop(self, thread: int) -> None:
        """See `Session.stop`. What a step cannot be stopped in is said in `common.pipelines.stopping`."""
        self._guard.stop(thread)
        self._session.stop(thread)

    def close(self) -> None:
        """See `Session.close`."""
        self._session.close()
        del self._before, self._after

    def _through(self, chain: Chain, arrays: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return chain.run(arrays)
        except StepFailed as error:
            raise EngineFailure(str(error)) from error


def _check_joint(what: str, promised: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]) -> None:
    difference = mismatch(promised, found)
    if difference:
        raise EngineFailure(f"{what} other tensors than its manifest says: {difference}")
