"""New weights for a session that runs: the cheapest swap there is, for models that are made for it.

An ONNX graph may list initializers among its inputs; those can be given with each request. When a new release differs
from one that is in memory in the values of such initializers and in nothing else, bit for bit, its session is the same
engine session, fed with the new values by reference. Nothing is loaded, and each request sees one version of all of
them. To everybody else it is a session like any other: it is checked, tested, watched and taken back as always.

The engine session is closed with the last of those that share it. Models with weights in files of their own are loaded
in full, and so is a file that is loaded again. All methods may be called from several threads; `load` reads both files.
"""

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from common.artifact import TensorSpec
from common.artifact.onnx_io import read_signature
from common.artifact.source import ByteSource
from common.artifact.tensors import DTYPES, Array
from common.artifact.weights import Weight, weights
from common.errors import InvalidInput
from common.filesource import FileSource
from common.ids import ModelName
from edge_agent.inference.engine import Session

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1024 * 1024
FED_BYTES_MAX = 64 * 1024 * 1024
"""New values of one release; more of them are loaded in full."""

Weights = dict[str, Array]


class Feedable(Session, Protocol):
    """A session some of whose weights can be given with each request."""

    overridable: tuple[TensorSpec, ...]

    def run_with(self, feeds: Mapping[str, Array], given: Mapping[str, Array], outputs: Sequence[str]) -> Weights:
        """As `run`, with the weights `given` by name, which are not copied."""
        ...


class _Shared:
    """An engine session, and how many releases stand on it."""

    def __init__(self, session: Feedable) -> None:
        self.session = session
        self.users = 0


class FedSession:
    """One release on a shared engine session, with its own values of some weights."""

    def __init__(self, shared: _Shared, path: Path, given: Weights, closed: "Callable[[FedSession], None]") -> None:
        self.inputs, self.outputs = shared.session.inputs, shared.session.outputs
        self.shared = shared
        self.path = path
        self.given = given
        self._closed = closed

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """See `Session.run`."""
        return self.shared.session.run_with(feeds, self.given, outputs)

    def stop(self, thread: int) -> None:
        """See `Session.stop`."""
        self.shared.session.stop(thread)

    def close(self) -> None:
        """See `Session.close`."""
        self._closed(self)


class LiveModels:
    """The sessions in memory that can be fed, by model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[ModelName, list[FedSession]] = {}

    def suits(self, model: ModelName, path: Path) -> bool:
        """Whether the release at `path` needs no load; blocks."""
        return self._found(model, path) is not None

    def load(self, model: ModelName, path: Path, full: Callable[[Path], Session]) -> Session:
        """A session for the verified file at `path`: on one that runs, or else what `full` makes of it."""
        found = self._found(model, path)
        if found is not None:
            base, given = found
            with self._lock:
                if base.shared.users:
                    logger.info("new weights for the session that runs", extra={"model": model, "tensors": len(given)})
                    return self._opened(model, base.shared, path, given)
        session = full(path)
        if not getattr(session, "overridable", ()) or not _stands_alone(path):
            return session
        with self._lock:
            return self._opened(model, _Shared(session), path, {})  # type: ignore[arg-type]  # it has `overridable`

    def _found(self, model: ModelName, path: Path) -> tuple[FedSession, Weights] | None:
        with self._lock:
            candidates = list(reversed(self._open.get(model, [])))
        # The same path: it is loaded again because its bytes were mended, and the session may have mapped the bad ones.
        for base in (one for one in candidates if one.path != path):
            given = _read(base, path)
            if given is not None:
                return base, given
        return None

    def _opened(self, model: ModelName, shared: _Shared, path: Path, given: Weights) -> FedSession:
        session = FedSession(shared, path, given, lambda one: self._close(model, one))
        shared.users += 1
        self._open.setdefault(model, []).append(session)
        return session

    def _close(self, model: ModelName, session: FedSession) -> None:
        with self._lock:
            self._open[model].remove(session)
            session.shared.users -= 1
            last = session.shared.users == 0
        if last:
            session.shared.session.close()


def _stands_alone(path: Path) -> bool:
    """Whether no weights are kept in a file beside the model."""
    try:
        with FileSource(path) as source:
            return not read_signature(source).external
    except (OSError, InvalidInput):
        return False


def _read(base: FedSession, path: Path) -> Weights | None:
    """The weights to feed for the release at `path`, if it is that of `base` but for their values."""
    try:
        with FileSource(base.path) as old, FileSource(path) as new:
            return fed_weights(old, new, base.shared.session.overridable, base.given.keys())
    except OSError:
        return None


def fed_weights(
    old: ByteSource, new: ByteSource, overridable: tuple[TensorSpec, ...], fed: Collection[str] = ()
) -> Weights | None:
    """The values that `new` has for those of `overridable` that differ or are `fed` in `old` already, by name.

    None when the files differ in anything else.
    """
    specs = {spec.name: spec for spec in overridable if spec.datatype in DTYPES and spec.datatype != "BYTES"}
    tensors = weights(new)
    places = [weight for weight in tensors if weight.name in specs]
    if old.size != new.size or tensors != weights(old) or len({weight.name for weight in places}) != len(places):
        return None
    if sum(weight.span.end - weight.span.start for weight in places) > FED_BYTES_MAX or not _same_but(old, new, places):
        return None
    changed = [weight for weight in places if weight.name in fed or _bytes(old, weight) != _bytes(new, weight)]
    return {weight.name: _values(new, weight, specs[weight.name]) for weight in changed}


def _same_but(old: ByteSource, new: ByteSource, places: Sequence[Weight]) -> bool:
    """Whether both files have the same bytes everywhere else. `places` are in file order."""
    at = 0
    for start, end in [*(weight.span for weight in places), (old.size, old.size)]:
        while at < start:
            size = min(BLOCK_BYTES, start - at)
            if old.read_at(at, size) != new.read_at(at, size):
                return False
            at += size
        at = end
    return True


def _values(source: ByteSource, weight: Weight, spec: TensorSpec) -> Array:
    return np.frombuffer(_bytes(source, weight), DTYPES[spec.datatype]).reshape(weight.shape)


def _bytes(source: ByteSource, weight: Weight) -> bytes:
    return source.read_at(weight.span.start, weight.span.end - weight.span.start)
