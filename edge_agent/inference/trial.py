"""Trying a release out: one attempt at a request, the checks before it may serve, and probes without a caller.

An answer is good when the engine returned and every float in it is finite.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from common.artifact import TensorSpec
from common.artifact.tensors import DTYPES, Array
from common.errors import FerryError, InvalidInput
from edge_agent.inference.engine import EngineFailure, Session
from edge_agent.inference.health import Health
from edge_agent.inference.tensors import mismatch, non_finite

WARM_UP_RUNS = 2
"""The first run allocates; the second shows that it left nothing behind that breaks the next."""


class ModelRejected(FerryError):
    """The release cannot serve on this device: it does not load, is not what its manifest says, or cannot run."""

    code = "model_rejected"


class Attempt(NamedTuple):
    """How a release did on one request: `outputs` or a `failure`, and the name of an output that was not finite."""

    outputs: dict[str, Array] | None = None
    failure: FerryError | None = None
    flaw: str | None = None

    @property
    def good(self) -> bool:
        return self.failure is None and self.flaw is None

    @property
    def refused(self) -> bool:
        """Whether a step says that the caller sent something useless; no verdict on the release."""
        return isinstance(self.failure, InvalidInput)


class Runnable(Protocol):
    """A session, or what stands for one."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]: ...


def attempt(release: Runnable, feeds: Mapping[str, Array], outputs: Sequence[str]) -> Attempt:
    """One request, whatever comes of it."""
    try:
        found = release.run(feeds, outputs)
    except FerryError as failure:
        return Attempt(failure=failure)
    return Attempt(outputs=found, flaw=non_finite(found))


def check_signature(session: Session, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Raise `ModelRejected` unless the session has the tensors of its manifest."""
    _check_tensors("input", inputs, session.inputs)
    _check_tensors("output", outputs, session.outputs)


def check_runs(session: Runnable, outputs: tuple[TensorSpec, ...], feeds: Mapping[str, Array]) -> None:
    """Raise unless the session answers `feeds` well, which also warms it up.

    Raises `ModelRejected`, and `Unavailable` (no memory; it says nothing).
    """
    names = [spec.name for spec in outputs]
    for _ in range(WARM_UP_RUNS):
        try:
            flaw = non_finite(session.run(feeds, names))
        except InvalidInput as error:
            fix = "give the step an example(), or the release samples"
            raise ModelRejected(f"a step takes no made-up input: {error}", fix=fix) from error
        except EngineFailure as error:
            fix = "if an open axis may not be of length 1, publish the release with samples"
            raise ModelRejected(f"the first run fails: {error.message}", fix=fix) from error
        if flaw:
            raise ModelRejected(f"output {flaw!r} is not finite in the first run", field="outputs")


def probe(release: Runnable, feeds: Mapping[str, Array], outputs: Sequence[str], count: int) -> Health:
    """How `count` requests of our own go."""
    errors = consecutive = 0
    for _ in range(count):
        good = attempt(release, feeds, outputs).good
        errors += not good
        consecutive = 0 if good else consecutive + 1
    return Health(count, errors, consecutive)


def _check_tensors(kind: str, promised: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]) -> None:
    for spec in promised:
        if spec.datatype not in DTYPES:
            unknown = f"{kind} {spec.name!r} has type {spec.datatype}"
            raise ModelRejected(unknown, field=f"{kind}s", fix=f"use one of {', '.join(DTYPES)}")
    difference = mismatch(promised, found)
    if difference:
        raise ModelRejected(f"{kind} {difference}", field=f"{kind}s", fix="publish the release from the right file")
