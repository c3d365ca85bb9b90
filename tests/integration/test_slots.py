"""Slots are complete or unnamed, and what nobody names is swept away."""

from pathlib import Path

import pytest

from common.artifact import ArtifactRef, digest_of
from common.errors import IntegrityFailure, NotFound, StorageFull
from common.ids import ModelName
from edge_agent.slots import Slots

MODEL = ModelName("kinds")
DATA = b"a model " * 1000
REF = ArtifactRef(digest_of(DATA), len(DATA))
MANIFEST = b"{}"
MANIFEST_REF = ArtifactRef(digest_of(MANIFEST), len(MANIFEST))


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_written_slot_holds_what_was_promised(slots: Slots) -> None:
    slots.write(MODEL, "a", REF, MANIFEST, lambda sink: (sink(DATA[:10]), sink(DATA[10:])))
    assert slots.verify(MODEL, "a", REF, MANIFEST_REF)
    assert slots.manifest(MODEL, "a") == MANIFEST
    assert not slots.verify(MODEL, "b", REF, MANIFEST_REF)
    with pytest.raises(NotFound):
        slots.manifest(MODEL, "b")


@pytest.mark.parametrize("given", [DATA[:-1], DATA + b"!", DATA[:-1] + b"!"], ids=["short", "long", "other"])
def test_other_bytes_leave_the_slot_as_it_was(slots: Slots, tmp_path: Path, given: bytes) -> None:
    slots.write(MODEL, "a", REF, MANIFEST, lambda sink: sink(DATA))
    before = files(tmp_path)
    with pytest.raises(IntegrityFailure):
        slots.write(MODEL, "a", REF, b"other", lambda sink: sink(given))
    assert files(tmp_path) == before
    assert slots.verify(MODEL, "a", REF, MANIFEST_REF)


def test_a_download_is_moved_in_without_a_copy_and_checked_once_more(slots: Slots, tmp_path: Path) -> None:
    slots.download_path(REF.digest).write_bytes(DATA)
    slots.move_in(MODEL, "b", REF, MANIFEST)
    assert slots.verify(MODEL, "b", REF, MANIFEST_REF)
    assert not list((tmp_path / "downloads").iterdir())
    slots.download_path(REF.digest).write_bytes(DATA[:-1] + b"!")
    with pytest.raises(IntegrityFailure):
        slots.move_in(MODEL, "a", REF, MANIFEST)
    assert not list((tmp_path / "downloads").iterdir())


def test_a_sweep_leaves_only_what_is_named(slots: Slots, tmp_path: Path) -> None:
    slots.write(MODEL, "a", REF, MANIFEST, lambda sink: sink(DATA))
    slots.write(MODEL, "b", REF, MANIFEST, lambda sink: sink(DATA))
    slots.write(ModelName("gone"), "a", REF, MANIFEST, lambda sink: sink(DATA))
    slots.download_path(REF.digest).with_suffix(".part").write_bytes(b"half")
    other = digest_of(b"other")
    slots.download_path(other).write_bytes(b"other")
    (tmp_path / "models/kinds/a/model.onnx.part").write_bytes(b"left by a crash")
    (tmp_path / "models/stray").write_bytes(b"?")
    slots.sweep({(MODEL, "a")}, [REF.digest])
    hexes = REF.digest.removeprefix("sha256:")
    assert files(tmp_path) == {
        "models/kinds/a/model.onnx",
        "models/kinds/a/manifest.json",
        f"downloads/{hexes}.part",
    }


def test_room_is_asked_for_with_the_reserve(tmp_path: Path) -> None:
    slots = Slots(tmp_path, reserve_bytes=100, free=lambda _: 1000)
    slots.make_room(900)
    with pytest.raises(StorageFull, match="901 bytes"):
        slots.make_room(901)
