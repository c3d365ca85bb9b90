"""Where releases live on the device: two slots per model, and the downloads on their way there.

    models/{model}/{a|b}/{file}           the release's files, each under its own name
    models/{model}/{a|b}/manifest.json    its signed manifest, as it came
    models/{model}/{a|b}.new/             a slot in the making
    models/{model}/{a|b}.old/             the slot whose place it takes, for that moment
    downloads/{sha256 hex}[.part]         files, patches, indexes and ranges, finished or under way
    downloads/{sha256 hex}.made           a file in the middle of a chain of patches, for as long as it takes
    downloads/{sha256 hex}.mend           the right bytes for a file that went bad in its slot, for that moment

Which slot is in service is in the journal, not here. A slot is made in a folder of its own, brought to the disk and
gets its name in one step, before the journal names it; nothing in it is changed afterwards, but for files that went bad
on the disk, which are replaced by what they were. Files that nobody names are swept away. A full disk is `StorageFull`,
asked for before the work where the size is known. All methods block: call them in a thread.
"""

import errno
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common import durable
from common.artifact import ArtifactRef, Hasher, hex_of
from common.artifact.manifest import FILE_NAME
from common.errors import IntegrityFailure, NotFound, StorageFull
from common.ids import Digest, ModelName
from edge_agent.fetch import cut_to_flushed
from edge_agent.update import MANIFEST_FILE, Slot

logger = logging.getLogger(__name__)

SLOTS: tuple[Slot, ...] = ("a", "b")
PART_SUFFIX = ".part"
MADE_SUFFIX = ".made"
MEND_SUFFIX = ".mend"
NEW_SUFFIX = ".new"
OLD_SUFFIX = ".old"
BLOCK_BYTES = 1024 * 1024
RESERVE_BYTES = 16 * 1024 * 1024
"""Room that an update leaves free: for the journal, the telemetry spool, and the rest of the machine."""

Sink = Callable[[bytes], object]
Still = Callable[[], bool]


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
        self._changing = threading.Lock()
        try:
            for made in (self._models, self._downloads):
                durable.make_folder(made)
            durable.fsync_folder(folder)  # a start that died may have made them without
        except OSError as error:  # no reason not to serve what is there
            logger.warning("the data folder takes nothing new", extra={"reason": str(error)})

    def path(self, model: ModelName, slot: Slot, name: str) -> Path:
        """A release's file in a slot. `IntegrityFailure` for a name that no file of a release may have."""
        return self._models / model / slot / _plain(name)

    def file(self, model: ModelName, slot: Slot, name: str) -> Path:
        """Any file of a slot, its manifest too."""
        return self._models / model / slot / (name if name == MANIFEST_FILE else _plain(name))

    def models(self) -> list[ModelName]:
        """The models that have a folder here."""
        return [ModelName(folder.name) for folder in sorted(self._models.iterdir()) if folder.is_dir()]

    def made_at(self, model: ModelName, slot: Slot) -> float:
        """When the slot was filled, Unix seconds by the clock of then; 0 if it is empty."""
        try:
            return self.file(model, slot, MANIFEST_FILE).stat().st_mtime
        except FileNotFoundError:
            return 0.0

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

    @contextmanager
    def replacing(self, model: ModelName, slot: Slot, manifest: bytes) -> Iterator["NewSlot"]:
        """A slot to fill, which takes the place of `slot` when the block ends well and is gone otherwise.

        Until then the files of `slot` can be read, so a release may be made from the one that it replaces.
        """
        folder = self._models / model / slot
        new, old = folder.with_name(slot + NEW_SUFFIX), folder.with_name(slot + OLD_SUFFIX)
        with durable.explaining_full_disk(folder):
            durable.remove(new)
            durable.make_folder(folder.parent)
            durable.make_folder(new)
            try:
                yield NewSlot(new)
                durable.write_file(new / MANIFEST_FILE, manifest)  # and with it the names of all files are on the disk
                durable.remove(old)
                with self._changing:
                    if folder.exists():
                        durable.move(folder, old)
                    durable.move(new, folder)
            finally:
                durable.remove(new)
            durable.fsync_folder(folder.parent)
            durable.fsync_folder(self._models)
            durable.remove(old)

    @contextmanager
    def intermediate(self, ref: ArtifactRef, fill: Callable[[Sink], object]) -> Iterator[Path]:
        """A file for the time of the block, as `fill` writes it; `IntegrityFailure` unless it becomes `ref`."""
        path = self.download_path(ref.digest).with_suffix(MADE_SUFFIX)
        with durable.scratch_file(path) as file:
            _write(file, ref, fill)
            file.close()
            yield path

    def verify(self, model: ModelName, slot: Slot, files: Mapping[str, ArtifactRef], manifest: ArtifactRef) -> bool:
        """Whether the slot holds exactly these bytes under these names, and the disk gives them back."""
        folder = self._models / model / slot
        try:
            return holds(folder / MANIFEST_FILE, manifest) and all(
                holds(self.path(model, slot, name), ref) for name, ref in files.items()
            )
        except OSError as error:
            if not is_damage(error):
                raise
            logger.warning("slot %s of %s cannot be read: %s", slot, model, error)
            return False

    def mend(self, model: ModelName, slot: Slot, name: str, ref: ArtifactRef, *, source: Path, still: Still) -> None:
        """Replace a file of a slot that went bad by the bytes at `source`; `IntegrityFailure` unless they are `ref`.

        `still` is asked when no slot can change any more: `NotFound` if the file is not the one that it was.
        """
        mended = self.download_path(ref.digest).with_suffix(MEND_SUFFIX)
        try:
            with durable.new_file(mended) as file:
                _write(file, ref, lambda sink: copy_into(source, sink))
            with self._changing:
                if not still():
                    raise NotFound(f"slot {slot} of {model} holds another release by now")
                durable.commit_file(mended, self.file(model, slot, name))
        finally:
            durable.remove(mended)

    def tidy(self, model: ModelName, keep: Collection[Slot], downloads: Iterable[Digest]) -> None:
        """Empty the model's slots that are not in `keep`, and remove these downloads."""
        for slot in SLOTS:
            if slot not in keep:
                durable.remove(self._models / model / slot)
        for digest in downloads:
            path = self.download_path(digest)
            durable.remove(path)
            durable.remove(path.with_name(path.name + PART_SUFFIX))

    def drop(self, digest: Digest) -> None:
        """Remove a download whose bytes are worth nothing."""
        durable.remove(self.download_path(digest))

    def sweep(
        self, slots: Collection[tuple[ModelName, Slot]], downloads: Iterable[Digest], *, flushed_only: bool = False
    ) -> None:
        """Remove every file that is in none of `slots` and no download of one of `downloads`.

        A slot that was to be replaced in the moment of a crash is put back first: the new one may be made from it.
        `flushed_only`: of downloads under way only what is sure to have reached the disk is kept (after a power cut).
        """
        for old in self._models.glob(f"*/*{OLD_SUFFIX}"):
            if not old.with_suffix("").exists():
                durable.move(old, old.with_suffix(""))
        wanted = {hex_of(digest) for digest in downloads}
        for file in self._downloads.iterdir():
            if file.name.removesuffix(PART_SUFFIX) not in wanted:
                durable.remove(file)
            elif flushed_only and file.name.endswith(PART_SUFFIX):
                cut_to_flushed(file)
        known = {(str(model), str(slot)) for model, slot in slots}
        for folder in self._models.iterdir():
            for slot in folder.iterdir() if folder.is_dir() else ():
                if (folder.name, slot.name) not in known:
                    durable.remove(slot)
            if not any(model == folder.name for model, _ in known):
                durable.remove(folder)


class NewSlot:
    """A slot in the making (see `Slots.replacing`): what is put into it is verified and on the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """A file that was put in."""
        return self._folder / _plain(name)

    def write(self, name: str, ref: ArtifactRef, fill: Callable[[Sink], object]) -> None:
        """Put in `ref`, as `fill` writes it into the sink it is given; `IntegrityFailure` when other bytes come."""
        with durable.new_file(self.path(name)) as file:
            _write(file, ref, fill)

    def take(self, name: str, ref: ArtifactRef, download: Path) -> None:
        """Put in a finished download without a second copy of it; the bytes are checked once more.

        The download keeps its own name too, so that it is not lost with a slot that does not become complete; on a file
        system without hard links it is moved.
        """
        if not holds(download, ref):
            raise IntegrityFailure(f"the downloaded bytes are not {ref.digest}")
        durable.link_or_move(download, self.path(name))


def _plain(name: str) -> str:
    """`name`, if it may be a release's file: the signatures say who wrote it, not that it stays in its folder."""
    if name == MANIFEST_FILE or not re.fullmatch(FILE_NAME, name):
        raise IntegrityFailure(f"no file of a release may be called {name[:80]!r}")
    return name


def _write(file: IO[bytes], ref: ArtifactRef, fill: Callable[[Sink], object]) -> None:
    hasher = Hasher()

    def sink(block: bytes) -> None:
        if hasher.size + len(block) > ref.size:
            raise IntegrityFailure(f"more than the promised {ref.size} bytes came for {ref.digest}")
        hasher.update(block)
        file.write(block)

    fill(sink)
    if (hasher.digest(), hasher.size) != (ref.digest, ref.size):
        raise IntegrityFailure(f"the rebuilt bytes are not {ref.digest}")


def is_damage(error: OSError) -> bool:
    """Whether the disk has lost the bytes; every other trouble with a file says nothing about them."""
    return isinstance(error, FileNotFoundError) or error.errno in {errno.EIO, errno.EUCLEAN, errno.EBADMSG}


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
