"""Where releases live on the device: two slots per model, and the downloads on their way there.

    models/{model}/{a|b}/model.onnx       the artifact
    models/{model}/{a|b}/manifest.json    its signed manifest, as it came
    downloads/{sha256 hex}[.part]         artifacts and patches, finished or under way

Which slot is in service is in the journal, not here: a slot is made complete and brought to the disk before the journal
names it, and it is written only while the journal does not name it. Files that nobody names are swept away. A full disk
is `StorageFull`, asked for before the work where the size is known. All methods block: call them in a thread.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.artifact import ArtifactRef, Hasher, hex_of
from common.durable import commit_file, explaining_full_disk, fsync_folder, write_file
from common.errors import IntegrityFailure, NotFound, StorageFull
from common.ids import Digest, ModelName
from edge_agent.update import Slot

SLOTS: tuple[Slot, ...] = ("a", "b")
MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
PART_SUFFIX = ".part"
BLOCK_BYTES = 1024 * 1024
RESERVE_BYTES = 16 * 1024 * 1024
"""Room that an update leaves free: for the journal, the telemetry spool, and the rest of the machine."""

Sink = Callable[[bytes], object]


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the disk that holds `folder`."""
    return shutil.disk_usage(folder).free


class Slots:
    """The files of all models below one data folder. `free` says how much room there is."""

    def __init__(
        self, folder: Path, *, reserve_bytes: int = RESERVE_BYTES, free: Callable[[Path], int] = free_bytes
    ) -> None:
        self._models = folder / "models"
        self._downloads = folder / "downloads"
        self._reserve_bytes = reserve_bytes
        self._free = free
        with explaining_full_disk(folder):
            for made in (self._models, self._downloads):
                made.mkdir(parents=True, exist_ok=True)

    def model_path(self, model: ModelName, slot: Slot) -> Path:
        """The artifact in a slot."""
        return self._models / model / slot / MODEL_FILE

    def manifest(self, model: ModelName, slot: Slot) -> bytes:
        """The signed manifest in a slot; `NotFound` when it is not there."""
        try:
            return (self._models / model / slot / MANIFEST_FILE).read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"slot {slot} of {model} has no manifest") from error

    def download_path(self, digest: Digest) -> Path:
        """Where a download ends up; what is under way stands beside it."""
        return self._downloads / hex_of(digest)

    def make_room(self, needed: int) -> None:
        """Raise `StorageFull` unless `needed` more bytes fit and leave the reserve free."""
        free = self._free(self._models)
        if free < needed + self._reserve_bytes:
            message = f"the update needs {needed} bytes and {self._reserve_bytes} in reserve, {free} are free"
            raise StorageFull(message, fix="free some space; the update goes on by itself")

    def downloaded_bytes(self, ref: ArtifactRef) -> int:
        """How much of a download is on the disk already."""
        path = self.download_path(ref.digest)
        return max((_size(file) for file in (path, path.with_name(path.name + PART_SUFFIX))), default=0)

    def write(
        self, model: ModelName, slot: Slot, target: ArtifactRef, manifest: bytes, fill: Callable[[Sink], object]
    ) -> None:
        """Make the slot hold `target`, as `fill` writes it into the sink it is given, and `manifest`.

        Raises `IntegrityFailure`, with the slot left as it was, when other bytes come than `target` names.
        """
        with self._new_file(model, slot) as (file, temporary):
            hasher = Hasher()

            def sink(block: bytes) -> None:
                if hasher.size + len(block) > target.size:
                    raise IntegrityFailure(f"more than the promised {target.size} bytes came for {target.digest}")
                hasher.update(block)
                file.write(block)

            fill(sink)
            if (hasher.digest(), hasher.size) != (target.digest, target.size):
                raise IntegrityFailure(f"the rebuilt bytes are not {target.digest}")
            self._put(model, slot, file, temporary, manifest)

    def move_in(self, model: ModelName, slot: Slot, target: ArtifactRef, manifest: bytes) -> None:
        """Make the slot hold a finished download, without a second copy of it; the bytes are checked once more."""
        download = self.download_path(target.digest)
        if not holds(download, target):
            download.unlink(missing_ok=True)
            raise IntegrityFailure(f"the downloaded bytes are not {target.digest}")
        path = self._folder(model, slot) / MODEL_FILE
        with explaining_full_disk(path):
            write_file(path.with_name(MANIFEST_FILE), manifest)
            commit_file(download, path)

    def verify(self, model: ModelName, slot: Slot, artifact: ArtifactRef, manifest: ArtifactRef) -> bool:
        """Whether the slot holds exactly these bytes."""
        path = self.model_path(model, slot)
        return holds(path, artifact) and holds(path.with_name(MANIFEST_FILE), manifest)

    def tidy(self, model: ModelName, keep: Collection[Slot], downloads: Iterable[Digest]) -> None:
        """Empty the model's slots that are not in `keep`, and remove these downloads."""
        for slot in SLOTS:
            if slot not in keep:
                _remove(self._models / model / slot)
        for digest in downloads:
            path = self.download_path(digest)
            _remove(path)
            _remove(path.with_name(path.name + PART_SUFFIX))

    def sweep(self, slots: Collection[tuple[ModelName, Slot]], downloads: Iterable[Digest]) -> None:
        """Remove every file that is in none of `slots` and no download of one of `downloads`."""
        wanted = {hex_of(digest) for digest in downloads}
        for file in self._downloads.iterdir():
            if file.name.removesuffix(PART_SUFFIX) not in wanted:
                _remove(file)
        known = {(str(model), str(slot)) for model, slot in slots}
        for folder in self._models.iterdir():
            for slot in folder.iterdir() if folder.is_dir() else ():
                self._sweep_slot(slot, keep=(folder.name, slot.name) in known)
            if not any(model == folder.name for model, _ in known):
                _remove(folder)

    def _sweep_slot(self, slot: Path, *, keep: bool) -> None:
        if not keep:
            _remove(slot)
            return
        for file in slot.iterdir():
            if file.name not in {MODEL_FILE, MANIFEST_FILE}:
                _remove(file)

    def _folder(self, model: ModelName, slot: Slot) -> Path:
        folder = self._models / model / slot
        with explaining_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(folder.parent)
            fsync_folder(self._models)
        return folder

    @contextmanager
    def _new_file(self, model: ModelName, slot: Slot) -> Iterator[tuple[IO[bytes], Path]]:
        temporary = self._folder(model, slot) / f"{MODEL_FILE}{PART_SUFFIX}"
        with explaining_full_disk(temporary):
            try:
                with temporary.open("wb") as file:
                    yield file, temporary
            finally:
                temporary.unlink(missing_ok=True)

    def _put(self, model: ModelName, slot: Slot, file: IO[bytes], temporary: Path, manifest: bytes) -> None:
        file.flush()
        os.fsync(file.fileno())
        path = self.model_path(model, slot)
        write_file(path.with_name(MANIFEST_FILE), manifest)
        commit_file(temporary, path)


def holds(path: Path, ref: ArtifactRef) -> bool:
    """Whether the file at `path` is exactly `ref`."""
    hasher = Hasher()
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != ref.size:
                return False
            while block := file.read(BLOCK_BYTES):
                hasher.update(block)
    except FileNotFoundError:
        return False
    return hasher.digest() == ref.digest


def copy_into(path: Path, sink: Sink) -> None:
    """Feed the file at `path` to `sink`."""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            sink(block)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
