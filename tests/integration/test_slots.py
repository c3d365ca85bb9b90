"""Slots are complete or unnamed, and what nobody names is swept away."""

import errno
from pathlib import Path

import pytest

from common.artifact import ArtifactRef, digest_of
from common.errors import IntegrityFailure, NotFound, StorageFull
from common.ids import ModelName
from edge_agent.slots import Slots, copy_into
from edge_agent.update import Slot

MODEL = ModelName("kinds")
DATA = b"a model " * 1000
REF = ArtifactRef(digest_of(DATA), len(DATA))
WEIGHTS = b"weights" * 500
WEIGHTS_REF = ArtifactRef(digest_of(WEIGHTS), len(WEIGHTS))
FILES = {"model.onnx": REF, "weights.bin": WEIGHTS_REF}
MANIFEST = b"{}"
MANIFEST_REF = ArtifactRef(digest_of(MANIFEST), len(MANIFEST))


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def put(slots: Slots, slot: Slot = "a", *, model: ModelName = MODEL, given: bytes = DATA) -> None:
    """Fill a slot with two files; `given` are the bytes that come for the first."""
    with slots.replacing(model, slot, MANIFEST) as new:
        new.write("weights.bin", WEIGHTS_REF, lambda sink: sink(WEIGHTS))
        new.write("model.onnx", REF, lambda sink: (sink(given[:10]), sink(given[10:])))


def test_a_written_slot_holds_what_was_promised(slots: Slots) -> None:
    put(slots)
    assert slots.verify(MODEL, "a", FILES, MANIFEST_REF)
    assert slots.manifest(MODEL, "a") == MANIFEST
    assert not slots.verify(MODEL, "b", FILES, MANIFEST_REF)
    with pytest.raises(NotFound):
        slots.manifest(MODEL, "b")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_slot_is_complete_only_when_each_of_its_files_is(slots: Slots, tmp_path: Path, name: str) -> None:
    put(slots)
    path = tmp_path / "models/kinds/a" / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert not slots.verify(MODEL, "a", FILES, MANIFEST_REF)
    path.unlink()
    assert not slots.verify(MODEL, "a", FILES, MANIFEST_REF)


@pytest.mark.parametrize("given", [DATA[:-1], DATA + b"!", DATA[:-1] + b"!"], ids=["short", "long", "other"])
def test_other_bytes_leave_the_slot_as_it_was(slots: Slots, tmp_path: Path, given: bytes) -> None:
    put(slots)
    before = files(tmp_path)
    with pytest.raises(IntegrityFailure):
        put(slots, given=given)
    assert files(tmp_path) == before
    assert slots.verify(MODEL, "a", FILES, MANIFEST_REF)


def test_a_slot_can_be_made_from_what_it_replaces(slots: Slots) -> None:
    put(slots)
    with slots.replacing(MODEL, "a", MANIFEST) as new:
        new.write("model.onnx", REF, lambda sink: copy_into(slots.path(MODEL, "a", "model.onnx"), sink))
    assert slots.verify(MODEL, "a", {"model.onnx": REF}, MANIFEST_REF)
    assert not slots.path(MODEL, "a", "weights.bin").exists()


def test_a_download_is_taken_in_without_a_copy_and_checked_once_more(slots: Slots) -> None:
    download = slots.download_path(REF.digest)
    download.write_bytes(DATA)
    with slots.replacing(MODEL, "b", MANIFEST) as new:
        new.take("model.onnx", REF, download)
    assert slots.verify(MODEL, "b", {"model.onnx": REF}, MANIFEST_REF)
    assert slots.path(MODEL, "b", "model.onnx").samefile(download), "a slot that is lost does not cost the download"
    download.write_bytes(DATA[:-1] + b"!")
    with pytest.raises(IntegrityFailure), slots.replacing(MODEL, "a", MANIFEST) as new:
        new.take("model.onnx", REF, download)


def test_without_hard_links_a_download_is_moved_in(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("os.link", no_links)
    download = slots.download_path(REF.digest)
    download.write_bytes(DATA)
    with slots.replacing(MODEL, "b", MANIFEST) as new:
        new.take("model.onnx", REF, download)
    assert slots.verify(MODEL, "b", {"model.onnx": REF}, MANIFEST_REF)
    assert not download.exists()


@pytest.mark.parametrize("name", ["../model.onnx", "a/b", "/etc/passwd", "..", "", ".hidden", "manifest.json", "a\0b"])
def test_no_name_leads_out_of_the_slot_or_onto_a_file_of_ours(slots: Slots, tmp_path: Path, name: str) -> None:
    with pytest.raises(IntegrityFailure), slots.replacing(MODEL, "a", MANIFEST) as new:
        new.write(name, REF, lambda sink: sink(DATA))
    with pytest.raises(IntegrityFailure):
        slots.path(MODEL, "a", name)
    assert files(tmp_path) == set()


def test_a_file_in_the_middle_of_a_chain_is_checked_and_does_not_stay(slots: Slots, tmp_path: Path) -> None:
    with slots.intermediate(REF, lambda sink: sink(DATA)) as path:
        assert path.read_bytes() == DATA
    with pytest.raises(IntegrityFailure), slots.intermediate(REF, lambda sink: sink(DATA[1:])):
        pass
    assert files(tmp_path) == set()


def test_a_sweep_leaves_only_what_is_named(slots: Slots, tmp_path: Path) -> None:
    put(slots)
    put(slots, "b")
    put(slots, model=ModelName("gone"))
    slots.download_path(REF.digest).with_suffix(".part").write_bytes(b"half")
    for leftover in (slots.download_path(digest_of(b"other")), slots.download_path(REF.digest).with_suffix(".made")):
        leftover.write_bytes(b"left by a crash")
    (tmp_path / "models/kinds/a.new").mkdir()
    (tmp_path / "models/kinds/a.new/model.onnx").write_bytes(b"left by a crash")
    (tmp_path / "models/stray").write_bytes(b"?")
    slots.sweep({(MODEL, "a")}, [REF.digest])
    hexes = REF.digest.removeprefix("sha256:")
    assert files(tmp_path) == {
        "models/kinds/a/model.onnx",
        "models/kinds/a/weights.bin",
        "models/kinds/a/manifest.json",
        f"downloads/{hexes}.part",
    }


def test_a_slot_that_was_to_be_replaced_in_the_moment_of_a_crash_is_put_back(slots: Slots, tmp_path: Path) -> None:
    put(slots)
    model = tmp_path / "models/kinds"
    (model / "a").rename(model / "a.old")
    (model / "a.new").mkdir()
    slots.sweep({(MODEL, "a")}, [])
    assert slots.verify(MODEL, "a", FILES, MANIFEST_REF)
    put(slots)
    (model / "a.old").mkdir()  # and with the new one in its place, the old one goes
    slots.sweep({(MODEL, "a")}, [])
    assert slots.verify(MODEL, "a", FILES, MANIFEST_REF)
    assert [path.name for path in model.iterdir()] == ["a"]


def test_room_is_asked_for_with_the_reserve(tmp_path: Path) -> None:
    slots = Slots(tmp_path, reserve_bytes=100, free=lambda _: 1000)
    slots.make_room(900)
    with pytest.raises(StorageFull, match="901 bytes"):
        slots.make_room(901)
