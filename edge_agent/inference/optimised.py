"""What the engine made of a model's graph, kept on the disk: the next load maps it instead of working it out again.

    optimised/{model}/{release's identity}/{setup}/model.onnx         the optimised graph
    optimised/{model}/{release's identity}/{setup}/model.onnx.data    its weights, mapped into memory by the session
    optimised/{model}/{release's identity}/{setup}/digests.json       written last: what the other two must be
    optimised/{model}/new/                                            an entry in the making

An entry is made by the first load of a release, which is slow anyway, and serves every later one. Nobody signed these
bytes, so they are believed only if they are what this device itself wrote: each load reads them against the digests,
and an entry with one wrong bit is removed and made again. An entry is also compared with the plain session before it is
kept: both must answer a made-up input with the same bits, or not at all.

A setup is all that the graph depends on besides the release's bytes: runtime, options, processor, and which of the
files is the model. Graphs for the CPU are kept, of releases without operators of their own; steps around a model are
not part of its graph.

Trouble with the cache (no room, a graph that cannot be written, another answer) is never the release's: it is loaded
plainly then. All methods block: call them in a thread.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from common import durable
from common.artifact import ArtifactRef, Hasher, digest_of, hex_of
from common.artifact.tensors import Array
from common.errors import FerryError, StorageFull, Unavailable
from common.ids import Digest, ModelName
from edge_agent.inference.engine import Beside, EngineFailure, Session
from edge_agent.inference.tensors import synthetic

logger = logging.getLogger(__name__)

GRAPH_FILE = "model.onnx"
DIGESTS_FILE = "digests.json"
NEW = "new"
MODEL_BYTES_MIN = 1024 * 1024
"""Smaller releases load plainly: mapping saves them nothing that is worth two files (see docs/adr/0017)."""
BYTES_MAX = 512 * 1024 * 1024
BLOCK_BYTES = 1024 * 1024

Free = Callable[[Path], int]


class KeptFile(NamedTuple):
    """A file of an entry: at `path`, `ref` when it was written, for the release whose identity is `release` in hex."""

    release: str
    path: Path
    ref: ArtifactRef


class Optimiser(Protocol):
    """An engine that can write down what it made of a graph."""

    @property
    def setup(self) -> str:
        """All that an optimised graph depends on besides the model: another setup, another graph."""
        ...

    def load(self, path: Path, beside: Beside) -> Session:
        """See `Engine.load`."""
        ...

    def on_cpu(self, path: Path, beside: Beside) -> bool:
        """Whether the next session for `path` is known to be one of the CPU's own operators: others are not kept."""
        ...

    def optimise(self, path: Path, target: Path) -> Session:
        """As `load`, and write the optimised graph to `target` and its weights beside it. Raises as `load` does."""
        ...

    def load_optimised(self, path: Path) -> Session:
        """A session for what `optimise` wrote. Raises as `load` does."""
        ...


class OptimisedModels:
    """The entries below `folder`, at most `bytes_max` bytes together. `free` tells the disk's free bytes, of which
    `reserve_bytes` are left.
    """

    def __init__(
        self,
        folder: Path,
        engine: Optimiser,
        *,
        bytes_max: int = BYTES_MAX,
        model_bytes_min: int = MODEL_BYTES_MIN,
        reserve_bytes: int,
        free: Free,
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._bytes_max = bytes_max
        self._model_bytes_min = model_bytes_min
        self._reserve_bytes = reserve_bytes
        self._free = free
        self._useless: set[Path] = set()
        """Entries that could not be made in this run of the program."""

    def takes(self, path: Path, beside: Beside) -> bool:
        """Whether a release is loaded from here; one with operators of its own or on another provider is not."""
        return self._engine.on_cpu(path, beside)

    def load(self, model: ModelName, path: Path, identity: Digest) -> Session:
        """A session for the verified file at `path` of the release with all the bytes that `identity` names.

        Raises what `Engine.load` raises, and only for trouble with `path` itself.
        """
        entry = self._entry(model, path, identity)
        session = self._load_kept(entry) or self._make(path, entry)
        return session or self._engine.load(path, Beside(identity=identity))

    def build(self, model: ModelName, path: Path, identity: Digest) -> bool:
        """Make and check the entry, if there is none, without keeping a session; whether there is one now."""
        entry = self._entry(model, path, identity)
        session = None if _is_intact(entry) else self._make(path, entry)
        if session is not None:
            session.close()
        return _is_intact(entry)

    def kept(self, model: ModelName) -> list[KeptFile]:
        """The files of the model's entries that could be loaded."""
        files: list[KeptFile] = []
        for release in _below(self._folder / model):
            for entry in _below(release) if release.name != NEW else ():
                with suppress(OSError, msgspec.DecodeError):
                    files += [KeptFile(release.name, entry / name, ref) for name, ref in _digests(entry).items()]
        return files

    def drop(self, file: KeptFile) -> None:
        """Remove the entry that `file` belongs to."""
        durable.remove(file.path.parent)

    def tidy(self, model: ModelName, keep: Collection[Digest]) -> None:
        """Remove the model's entries for releases that are not in `keep`."""
        kept = {hex_of(identity) for identity in keep}
        for folder in _below(self._folder / model):
            if folder.name not in kept:
                durable.remove(folder)
        if not kept:
            durable.remove(self._folder / model)

    def sweep(self, models: Collection[ModelName]) -> None:
        """Remove the entries of models that are not among `models`."""
        for folder in _below(self._folder):
            if folder.name not in models:
                durable.remove(folder)

    def clear(self) -> bool:
        """Make room for something more important; whether there was anything. Sessions that run go on."""
        had = bool(self.size)
        durable.remove(self._folder)
        return had

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())

    def _entry(self, model: ModelName, path: Path, identity: Digest) -> Path:
        setup = digest_of(f"{self._engine.setup}\n{path.name}".encode())
        return self._folder / model / hex_of(identity) / hex_of(setup)

    def _load_kept(self, entry: Path) -> Session | None:
        """From an entry that is whole; one that is not goes."""
        try:
            if _is_intact(entry):
                return self._engine.load_optimised(entry / GRAPH_FILE)
            if entry.exists():
                logger.warning("an optimised model went bad on the disk and is made again", extra={"entry": str(entry)})
                durable.remove(entry)
        except Unavailable:
            raise
        except (FerryError, OSError) as error:
            logger.warning("an optimised model is of no use: %s", error, extra={"entry": str(entry)})
            with suppress(OSError):
                durable.remove(entry)
        return None

    def _make(self, path: Path, entry: Path) -> Session | None:
        """Make the entry and give its session; None when it cannot be made, for whatever reason."""
        if entry in self._useless or not self._is_worth_it(path):
            return None
        try:
            with self._new_folder(entry) as new:
                session = self._optimised(path, new)
                _keep(new, entry)
        except (FerryError, OSError) as error:
            logger.warning("loading plainly: %s", error, extra={"entry": str(entry)})
            if not isinstance(error, StorageFull | Unavailable):  # there may be room another time
                self._useless.add(entry)
            return None
        return session

    def _is_worth_it(self, path: Path) -> bool:
        """Whether an entry about as large as the release is wanted and has room."""
        try:
            size = sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
            fits = self.size + size <= self._bytes_max
            return size >= self._model_bytes_min and fits and self._has_room(size)
        except OSError:
            return False

    def _has_room(self, size: int) -> bool:
        folder = next(folder for folder in (self._folder, *self._folder.parents) if folder.exists())
        return self._free(folder) >= size + self._reserve_bytes

    @contextmanager
    def _new_folder(self, entry: Path) -> Iterator[Path]:
        """A folder to fill, gone after the block unless it was moved. Entries of other setups make way for it."""
        new = entry.parent.parent / NEW
        durable.remove(entry.parent)
        durable.remove(new)
        durable.make_folder(new)
        try:
            yield new
        finally:
            durable.remove(new)

    def _optimised(self, path: Path, folder: Path) -> Session:
        """The session of a new entry, which answers as the plain one does. One session at a time is in memory."""
        plain = self._engine.optimise(path, folder / GRAPH_FILE)
        try:
            wanted = _answers(plain)
        finally:
            plain.close()
        session = self._engine.load_optimised(folder / GRAPH_FILE)
        if not _same(wanted, _answers(session)):
            session.close()
            raise EngineFailure(f"the optimised graph of {path.name} answers otherwise than the plain one")
        return session


def _keep(new: Path, entry: Path) -> None:
    """Give a finished entry its name: the files reach the disk first, then what they must be, then the name."""
    files = {}
    for file in _files(new):
        durable.flush_file(file)
        files[file.name] = _ref(file)
    durable.write_file(new / DIGESTS_FILE, msgspec.json.encode(files))
    durable.make_folder(entry.parent)
    durable.move(new, entry)
    durable.fsync_folder(entry.parent)


def _is_intact(entry: Path) -> bool:
    """Whether all of the entry's files, and no others, are what was written."""
    try:
        files = _digests(entry)
        names = {file.name for file in _files(entry)} - {DIGESTS_FILE}
        return names == files.keys() and all(_ref(entry / name) == ref for name, ref in files.items())
    except (OSError, msgspec.DecodeError):
        return False


def _digests(entry: Path) -> dict[str, ArtifactRef]:
    return msgspec.json.decode((entry / DIGESTS_FILE).read_bytes(), type=dict[str, ArtifactRef])


def _ref(file: Path) -> ArtifactRef:
    hasher = Hasher()
    with file.open("rb") as source:
        while block := source.read(BLOCK_BYTES):
            hasher.update(block)
    return ArtifactRef(hasher.digest(), hasher.size)


def _answers(session: Session) -> dict[str, Array] | None:
    """To a made-up input; None if the model cannot take it (its open axes may not be as short as that)."""
    try:
        return session.run(synthetic(session.inputs), [spec.name for spec in session.outputs])
    except EngineFailure:
        return None


def _same(one: dict[str, Array] | None, other: dict[str, Array] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(_same_bits(array, other[name]) for name, array in one.items())


def _same_bits(one: Array, other: Array) -> bool:
    if one.dtype == np.object_:
        return bool(np.array_equal(one, other))
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def _below(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
