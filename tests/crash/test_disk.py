"""The model of a disk loses what it must, keeps what it must, and agrees with a real one."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.durable import new_file, write_file
from tests.crash import recording
from tests.crash.disk import Disk, Loss, Op
from tests.crash.recording import Recorder, mark
from tests.crash.survey import tree_of

SEEDS = range(200)


def disk_after(*ops: Op) -> Disk:
    disk = Disk.holding({"state": b"old"})
    for op in ops:
        disk.do(op)
    return disk


def contents(disk: Disk, loss: Loss) -> set[bytes | None]:
    """What `state` may hold after a crash."""
    return {disk.tree(loss, random.Random(seed)).get("state") for seed in SEEDS}


WRITTEN = (Op("create", ".tmp"), Op("write", ".tmp", data=b"new"))


def test_a_killed_process_loses_nothing() -> None:
    assert contents(disk_after(*WRITTEN, Op("rename", ".tmp", "state")), Loss.KILLED) == {b"new"}


def test_a_rename_without_a_sync_may_name_an_empty_file() -> None:
    renamed = disk_after(*WRITTEN, Op("rename", ".tmp", "state"))
    assert contents(renamed, Loss.ALL) == {b"old"}
    assert b"" in contents(renamed, Loss.ANY)


def test_a_sync_before_the_rename_leaves_the_old_or_the_new() -> None:
    renamed = disk_after(*WRITTEN, Op("fsync", ".tmp"), Op("rename", ".tmp", "state"))
    assert contents(renamed, Loss.ANY) == {b"old", b"new"}
    renamed.do(Op("fsyncdir", ""))
    assert contents(renamed, Loss.ANY) == {b"new"}


def test_a_name_goes_with_its_unsynced_folder() -> None:
    made = disk_after(Op("mkdir", "folder"), Op("create", "folder/file"), Op("fsync", "folder/file"))
    made.do(Op("fsyncdir", "folder"))
    assert "folder" not in made.tree(Loss.ALL, random.Random(0))
    made.do(Op("fsyncdir", ""))
    assert "folder/file" in made.tree(Loss.ALL, random.Random(0))


def test_writes_are_lost_late_or_in_any_order_and_torn() -> None:
    grown = disk_after(*(Op("write", "state", offset=at * 1024, data=bytes([at]) * 1024) for at in range(3)))
    late = contents(grown, Loss.LATE)
    assert {len(data or b"") for data in late} == {3, 512, 1024, 1536, 2048, 2560, 3072}
    assert any(bytes(1024) in (data or b"")[1024:] for data in contents(grown, Loss.ANY)), "a gap reads as zeros"


def test_what_is_synced_is_sure() -> None:
    disk = disk_after(Op("write", "state", offset=3, data=b"er"))
    assert disk.synced() == {"state": 3}
    disk.do(Op("fsync", "state"))
    assert disk.synced() == {"state": 5}
    disk.do(Op("unlink", "state"))
    assert disk.synced() == {}


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    if why := recording.available():
        pytest.skip(why)
    with Recorder(tmp_path) as recorder:
        yield recorder


def test_a_record_gives_the_folder_that_it_was_made_of(recorder: Recorder) -> None:
    run = recorder.run()
    folder = run.recorded
    write_file(folder / "state", b"one")
    mark(folder, "told")
    (folder / "below").mkdir()
    with new_file(folder / "below/large") as file:
        file.write(bytes(300_000))
        file.seek(150_000)
        file.write(b"in the middle")
        file.truncate(200_000)
    (folder / "state").rename(folder / "below/moved")
    (folder / "second").hardlink_to(folder / "below/moved")
    ops = recorder.ops(run.name)
    disk = Disk()
    for op in ops:
        disk.do(op)
    assert disk.tree(Loss.KILLED, random.Random(0)) == tree_of(run.behind)
    assert [op.path for op in ops if op.kind == "mark"] == ["told"]
    assert not recorder.ops(run.name), "what was read is not read again"
