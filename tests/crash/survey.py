"""Crashes a story at every operation, starts a device on what is left, and lets it finish the story.

`Survey.record` carries a story out on the recording file system. From the record comes the disk as it may be after a
crash at any operation (`crash`), without carrying the story out again. `Survey.recover` starts the agent on such a
disk, first with no network, then goes on with the story, and notes what a user, the controller and the disk saw; what
must hold of that is in `invariants`. A recovery can be recorded too, and crashed in its turn.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import msgspec

from common.ids import Digest
from edge_agent.executor import Standing
from edge_agent.fetch import Session, http, open_session, partial
from edge_agent.journal import FILE_NAME
from edge_agent.update import ModelState, Stage
from tests.crash.device import Device
from tests.crash.disk import HIDDEN, Disk, Loss, Op
from tests.crash.recording import Recorder, mark
from tests.crash.stories import Author, Step, Story
from tests.integration.release_desk import ReleaseDesk

BLOCK_BYTES = 64 * 1024
FLUSH_BYTES = 128 * 1024

Tree = Mapping[str, bytes | None]


class Told(NamedTuple):
    """Something that happened outside the disk: step `asked` was given to the device, or it told how it stands."""

    asked: int
    standing: Standing | None


class Recording(NamedTuple):
    """A run, from the tree `before` over `ops`; `told` is what its marks say."""

    before: Tree
    ops: tuple[Op, ...]
    told: tuple[Told, ...]

    def told_by(self, index: int) -> tuple[Told, ...]:
        """What was told before operation `index`."""
        marks = [int(op.path) for op in self.ops[:index] if op.kind == "mark"]
        return tuple(self.told[number] for number in marks)


class Crash(NamedTuple):
    """What is left: the files, and what of each was on the disk for good (for files under way: how long that is)."""

    tree: Tree
    synced: Mapping[str, int]
    told: tuple[Told, ...]
    loss: Loss
    boot: int = 1
    """The run of the machine after the crash: another one when the power was cut."""

    @property
    def asked(self) -> int:
        """The step that the device was given last."""
        return max((told.asked for told in self.told), default=0)


class Memory(NamedTuple):
    """What a journal says, read by other means than the agent's."""

    state: ModelState | None
    generation: int
    running: bool
    envelope: bytes


class Recovery(NamedTuple):
    """What was seen after a crash. `started` is the state as soon as the agent was up, `offline` what it had written
    down before it could reach anybody.
    """

    left: Memory
    """The journal as the crash left it."""
    started: ModelState
    offline: Memory
    offline_tree: Tree
    offline_answer: tuple[str, float] | None
    accepted_older: bool
    sent: Mapping[Digest, int]
    asked: Mapping[Digest, int]
    """Bytes and requests until the step under way was done."""
    told: tuple[Told, ...]
    end: Memory
    end_tree: Tree
    end_answer: tuple[str, float] | None
    answers: frozenset[tuple[str, float] | None]
    closed_in_use: bool
    again: tuple[Memory, tuple[str, float] | None, int] | None
    """After one more restart: the journal, the answer, and how many requests that took."""


class Survey:
    """One desk, one session and one recorder for many runs."""

    def __init__(self, folder: Path, recorder: Recorder, *, run_s: float = 0.0) -> None:
        """`run_s` is how long each request stays in its session at least."""
        self._run_s = run_s
        self._folder = folder
        self._recorder = recorder
        self.desk = ReleaseDesk()
        self._session: Session | None = None
        (folder / "made").mkdir(parents=True)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["Survey"]:
        """With the desk serving, and downloads written in pieces that fit the small models."""
        await self.desk.start()
        with (
            patch.object(partial, "FLUSH_BYTES", FLUSH_BYTES),
            patch.object(partial, "BLOCK_BYTES_MAX", BLOCK_BYTES),
            patch.object(http, "BLOCK_BYTES", BLOCK_BYTES),
        ):
            async with open_session("token") as self._session:
                yield self
        await self.desk.stop()

    def author(self) -> Author:
        """Who writes stories for this survey's desk."""
        return Author(self.desk, self._folder / "made")

    async def record(self, story: Story) -> Recording:
        """Carry the story out once, undisturbed."""
        name, run, behind = self._recorder.run()
        told: list[Told] = []
        if story.before:  # otherwise the device begins with nothing at all
            async with self._device(story, behind, told, None) as device:
                for step in story.before:
                    await self._carry_out(device, step, 0, told, None)
        before = tree_of(behind)
        told.clear()
        self._recorder.ops(name)
        async with self._device(story, run, told, run) as device:
            for number, step in enumerate(story.steps, 1):
                await self._carry_out(device, step, number, told, run)
        return Recording(before, tuple(self._recorder.ops(name)), tuple(told))

    async def recover(
        self, story: Story, crash: Crash, *, recorded: bool = False, restarts: bool = False
    ) -> tuple[Recovery, Recording | None]:
        """Start on what the crash left and finish the story; `restarts`: then start once more."""
        name, run, behind = self._recorder.run()
        folder = run if recorded else behind
        write_tree(behind, crash.tree)
        self._recorder.ops(name)
        told: list[Told] = []
        marks = run if recorded else None
        recovery = await self._live_on(story, crash, folder, told, marks, restarts=restarts)
        ops = tuple(self._recorder.ops(name))
        recording = Recording(crash.tree, ops, tuple(told)) if recorded else None
        shutil.rmtree(behind)
        return recovery, recording

    async def _live_on(
        self, story: Story, crash: Crash, folder: Path, told: list[Told], marks: Path | None, *, restarts: bool
    ) -> Recovery:
        desk, step = self.desk, max(1, crash.asked)
        answers: set[tuple[str, float] | None] = set()
        desk.offline = True
        left = read_journal(folder)
        async with self._device(story, folder, told, marks, asked=crash.asked, boot=crash.boot) as device:
            started = device.state
            first = await device.ask_patiently()
            if started.stage is Stage.FETCHING:
                await device.until(lambda one: one.state.attempt or one.state.stage is not Stage.FETCHING, "offline")
            offline, offline_tree = read_journal(folder), tree_of(folder)
            desk.offline = False
            desk.sent.clear()
            desk.asked.clear()
            older = await device.executor.accept(story.before[0].envelope) if story.before and crash.asked else False
            asking = asyncio.create_task(self._keep_asking(device, answers))
            try:
                await self._carry_out(device, story.steps[step - 1], step, told, marks)
                sent, asked = Counter(desk.sent), Counter(desk.asked)
                for number, later in enumerate(story.steps[step:], step + 1):
                    await self._carry_out(device, later, number, told, marks)
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            last = await device.ask()
            await asyncio.gather(*(lane.settled() for lane in device.executor._lanes.values()))
            closed_in_use = device.engine.used_after_close
        end, end_tree = read_journal(folder), tree_of(folder)
        again = await self._start_again(story, folder, told, crash.boot) if restarts else None
        return Recovery(
            left=left,
            started=started,
            offline=offline,
            offline_tree=offline_tree,
            offline_answer=first,
            accepted_older=older,
            sent=sent,
            asked=asked,
            told=tuple(told),
            end=end,
            end_tree=end_tree,
            end_answer=last,
            answers=frozenset(answers),
            closed_in_use=closed_in_use,
            again=again,
        )

    async def _start_again(
        self, story: Story, folder: Path, told: list[Told], boot: int
    ) -> tuple[Memory, tuple[str, float] | None, int]:
        self.desk.asked.clear()
        async with self._device(story, folder, told, None, boot=boot) as device:
            answer = await device.ask()
            await asyncio.gather(*(lane.settled() for lane in device.executor._lanes.values()))
        return read_journal(folder), answer, self.desk.asked.total()

    async def _keep_asking(self, device: Device, answers: set[tuple[str, float] | None]) -> None:
        while True:
            answers.add(await device.ask_patiently())
            await asyncio.sleep(0.003)

    async def _carry_out(self, device: Device, step: Step, number: int, told: list[Told], marks: Path | None) -> None:
        self._tell(Told(number, None), told, marks)
        await device.executor.accept(step.envelope)
        asking = asyncio.create_task(self._keep_asking(device, set()))
        try:
            await device.until(step.until, step.what)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _device(
        self, story: Story, folder: Path, told: list[Told], marks: Path | None, *, asked: int = 0, boot: int = 1
    ) -> AsyncIterator[Device]:
        assert self._session is not None
        now = [asked]

        def tell(standing: Standing) -> None:
            now[0] = max([now[0], *(one.asked for one in told)])
            self._tell(Told(now[0], standing), told, marks)

        device = Device(folder, self.desk, self._session, tell, boot, story.room_bytes)
        device.engine.run_s = self._run_s
        try:
            await device.start()
            yield device
        finally:
            await device.stop(clean=True)

    def _tell(self, what: Told, told: list[Told], marks: Path | None) -> None:
        told.append(what)
        if marks is not None:
            mark(marks, str(len(told) - 1))


def crash(recording: Recording, index: int, loss: Loss, seed: int, before: Crash | None = None) -> Crash:
    """The machine as operation `index` was about to be done; `seed` draws what is lost.

    `before` is the crash from which the recording recovers.
    """
    disk = Disk.holding(recording.before)
    for op in recording.ops[:index]:
        disk.do(op)
    tree = disk.tree(loss, random.Random(f"{seed} {index}"))
    told = (*(before.told if before else ()), *recording.told_by(index))
    boot = (before.boot if before else 1) + (loss is not Loss.KILLED)
    return Crash(tree, disk.synced(), told, loss, boot)


def points(recording: Recording) -> list[int]:
    """Where a crash differs from the one before: after each operation, before and after what was told then."""
    ops = recording.ops
    return [
        i
        for i in range(len(ops) + 1)
        if i == len(ops) or ops[i].kind != "mark" or ops[i - 1 if i else 0].kind != "mark"
    ]


def tree_of(folder: Path) -> dict[str, bytes | None]:
    """A folder on the disk as `Disk.tree` gives it; what vanishes meanwhile is left out."""
    tree: dict[str, bytes | None] = {}
    for where, folders, files in os.walk(folder):
        tree |= {os.path.relpath(Path(where, name), folder): None for name in folders}
        for name in (one for one in files if not one.startswith(HIDDEN)):
            with contextlib.suppress(FileNotFoundError):
                tree[os.path.relpath(Path(where, name), folder)] = Path(where, name).read_bytes()
    return tree


def write_tree(folder: Path, tree: Tree) -> None:
    """The opposite."""
    for path, data in sorted(tree.items()):
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)


def read_journal(folder: Path) -> Memory:
    """What the journal in the folder says, by plain SQL on a copy of it."""
    if not (folder / FILE_NAME).exists():
        return Memory(None, 0, running=False, envelope=b"")
    copy = folder.with_name(f"{folder.name}-journal")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for suffix in ("", "-wal", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(folder / (FILE_NAME + suffix), copy / (FILE_NAME + suffix))
    connection = sqlite3.connect(copy / FILE_NAME)
    try:
        return _memory(connection)
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return Memory(None, 0, running=False, envelope=b"")
        raise
    finally:
        connection.close()
        shutil.rmtree(copy)


def _memory(connection: sqlite3.Connection) -> Memory:
    rows = connection.execute("select state from models").fetchall()
    numbers = dict(connection.execute("select name, value from numbers").fetchall())
    orders = connection.execute("select envelope from orders").fetchall()
    state = msgspec.json.decode(rows[0][0], type=ModelState) if rows else None
    return Memory(state, numbers.get("generation", 0), bool(numbers.get("running", 0)), orders[0][0] if orders else b"")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
