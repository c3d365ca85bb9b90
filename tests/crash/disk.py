"""What a disk may hold after a crash, built from the record of what was done to it.

A `Disk` takes operations one at a time and keeps apart what is saved (it was synced) and what is not: for each file the
writes since its last fsync, for all folders the changes of names since the last fsync of one of the folders concerned.
`Loss` says what becomes of the unsaved part. Deliberately stricter than any one file system: an fsync of a file does
not save its name, and what was not saved may be kept in any order.

Pure: it reads no disk; `Disk.tree` gives the files back as a mapping.
"""

import random
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple

import msgspec

HIDDEN = ".fuse_hidden"
"""How names begin that FUSE gives to files that were removed while somebody had them open: nothing names them."""

SECTOR_BYTES = 512
"""What a disk writes whole: a torn write ends on a multiple of it."""

PIECE_BYTES = 32 * 1024
"""Of a larger write each piece may reach the disk alone."""


class Op(msgspec.Struct, frozen=True, array_like=True):
    """One operation. `path` is below the run's folder; `to` is the new name of a rename or link.

    `offset` is where a write begins, or the length that a file is cut to. A `mark` is no operation on the disk: its
    `path` is what the program had to say at that moment.
    """

    kind: str
    path: str
    to: str = ""
    offset: int = 0
    data: bytes = b""


class Loss(StrEnum):
    """What a crash takes of what was not synced."""

    KILLED = "killed"
    """Nothing: the process is gone, the machine runs on."""
    ALL = "all"
    """Everything."""
    LATE = "late"
    """The newest of it: names and each file's writes up to some point survive, the last write perhaps torn."""
    ANY = "any"
    """Any of it: what survives is drawn for each change and each write alone."""


class File:
    """Bytes that are saved, and writes that are not; a write of None cuts the file to its offset."""

    def __init__(self) -> None:
        self.saved = b""
        self.unsaved: list[tuple[int, bytes | None]] = []

    def sync(self) -> None:
        self.saved, self.unsaved = self.content(self.unsaved), []

    def content(self, writes: list[tuple[int, bytes | None]]) -> bytes:
        """The saved bytes with `writes` done to them; a gap reads as zeros."""
        data = bytearray(self.saved)
        for offset, block in writes:
            data.extend(bytes(max(0, offset - len(data))))
            if block is None:
                del data[offset:]
            else:
                data[offset : offset + len(block)] = block
        return bytes(data)


Folder = dict[str, int]
"""Names in a folder, each with the number of what it names."""


class Change(NamedTuple):
    """Names that change together: (folder, name, what it names from now on; None: nothing)."""

    names: tuple[tuple[int, str, int | None], ...]


class Disk:
    """The state after the operations so far."""

    def __init__(self) -> None:
        self._files: dict[int, File] = {}
        self._now: dict[int, Folder] = {0: {}}
        self._saved: dict[int, Folder] = {0: {}}
        self._unsaved: list[Change] = []
        self._next = 1

    @classmethod
    def holding(cls, tree: Mapping[str, bytes | None]) -> "Disk":
        """A disk on which all of `tree` (see `tree`) is saved."""
        disk = cls()
        for path, data in sorted(tree.items()):
            if data is None:
                disk.do(Op("mkdir", path))
            else:
                disk.do(Op("create", path))
                disk.do(Op("write", path, data=data))
                disk.do(Op("fsync", path))
        for folder in list(disk._now):
            disk._sync_folder(folder)
        return disk

    def do(self, op: Op) -> None:
        """One operation, which succeeded when it was recorded."""
        match op.kind:
            case "mark":
                pass
            case "create" | "mkdir":
                self._make(op)
            case "write":
                pieces = range(0, len(op.data), PIECE_BYTES)
                self._file(op.path).unsaved += [(op.offset + at, op.data[at : at + PIECE_BYTES]) for at in pieces]
            case "truncate":
                self._file(op.path).unsaved.append((op.offset, None))
            case "fsync":
                self._file(op.path).sync()
            case "fsyncdir":
                self._sync_folder(self._find(op.path))
            case "unlink" | "rmdir":
                self._change((op.path, None))
            case "rename":
                self._change((op.path, None), (op.to, self._find(op.path)))
            case "link":
                self._change((op.to, self._find(op.path)))
            case _:
                raise AssertionError(f"unknown operation {op.kind}")

    def tree(self, loss: Loss, chance: random.Random) -> dict[str, bytes | None]:
        """The files (their bytes) and folders (None) that are there when the machine is up again, by path."""
        folders = {number: dict(names) for number, names in self._saved.items()}
        for change in _kept(self._unsaved, loss, chance):
            for folder, name, number in change.names:
                _put(folders[folder], name, number)
        return dict(self._walk(0, "", folders, loss, chance))

    def synced(self) -> dict[str, int]:
        """How many bytes of each file are sure to be there whatever is lost; a file whose name may go has none."""
        unsure = {(folder, name) for change in self._unsaved for folder, name, _ in change.names}
        return dict(self._synced(0, "", unsure))

    def _synced(self, folder: int, path: str, unsure: set[tuple[int, str]]) -> Iterator[tuple[str, int]]:
        for name, number in self._saved[folder].items():
            below = f"{path}/{name}" if path else name
            if (folder, name) in unsure:
                continue
            if number in self._saved:
                yield from self._synced(number, below, unsure)
            else:
                yield below, len(self._files[number].saved)

    def _walk(
        self, folder: int, path: str, folders: Mapping[int, Folder], loss: Loss, chance: random.Random
    ) -> list[tuple[str, bytes | None]]:
        found: list[tuple[str, bytes | None]] = []
        for name, number in sorted(folders[folder].items()):
            if name.startswith(HIDDEN):
                continue
            below = f"{path}/{name}" if path else name
            if number in folders:
                found += [(below, None), *self._walk(number, below, folders, loss, chance)]
            else:
                file = self._files[number]
                found.append((below, file.content(_torn(_kept(file.unsaved, loss, chance), loss, chance))))
        return found

    def _make(self, op: Op) -> None:
        number = self._next
        self._next += 1
        if op.kind == "mkdir":
            self._now[number], self._saved[number] = {}, {}
        else:
            self._files[number] = File()
        self._change((op.path, number))

    def _change(self, *names: tuple[str, int | None]) -> None:
        change = Change(tuple((*self._place(path), number) for path, number in names))
        for folder, name, number in change.names:
            _put(self._now[folder], name, number)
        self._unsaved.append(change)

    def _sync_folder(self, folder: int) -> None:
        """Save the changes that concern the folder, whole ones: a rename is one change, wherever it leads."""
        rest = []
        for change in self._unsaved:
            if all(other != folder for other, _, _ in change.names):
                rest.append(change)
                continue
            for where, name, number in change.names:
                _put(self._saved[where], name, number)
        self._unsaved = rest

    def _file(self, path: str) -> File:
        return self._files[self._find(path)]

    def _find(self, path: str) -> int:
        number = 0
        for name in filter(None, path.split("/")):
            number = self._now[number][name]
        return number

    def _place(self, path: str) -> tuple[int, str]:
        above, _, name = path.rpartition("/")
        return self._find(above), name


def _put(folder: Folder, name: str, number: int | None) -> None:
    if number is None:
        folder.pop(name, None)
    else:
        folder[name] = number


def _kept(changes: list, loss: Loss, chance: random.Random) -> list:  # type: ignore[type-arg]  # of changes or of writes
    match loss:
        case Loss.KILLED:
            return changes
        case Loss.ALL:
            return []
        case Loss.LATE:
            return changes[: chance.randint(0, len(changes))]
        case Loss.ANY:
            return [change for change in changes if chance.random() < 0.5]


def _torn(writes: list[tuple[int, bytes | None]], loss: Loss, chance: random.Random) -> list[tuple[int, bytes | None]]:
    """The same, with the last write cut short in half of the cases."""
    if loss in {Loss.KILLED, Loss.ALL} or not writes or chance.random() < 0.5:
        return writes
    offset, block = writes[-1]
    if block is None:
        return writes
    return [*writes[:-1], (offset, block[: chance.randint(0, len(block) // SECTOR_BYTES) * SECTOR_BYTES])]
