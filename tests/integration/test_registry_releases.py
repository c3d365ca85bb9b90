"""Publishing on real models, and garbage collection beside it."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from msgspec.structs import replace

from common.artifact.digest import digest_of
from common.artifact.manifest import PAYLOAD_TYPE, ArtifactRef, decode_manifest
from common.artifact.parts import decode_index, missing_bytes
from common.delta import CODECS
from common.errors import Conflict, FerryError, InvalidInput, NotFound, StorageFull
from common.ids import DeviceId, Digest, ModelName, Version
from common.trust import verify
from controller.registry import releases
from controller.registry.blobs import LocalBlobs
from controller.store.port import Patch
from tests.integration.registry_bench import FILE, MODEL, Bench, open_bench
from tests.small_models import save_with_data

HOUR_S = 3600.0
ABSENT = digest_of(b"never uploaded")


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async for made in open_bench(tmp_path, time.time()):
        yield made


@pytest.fixture
async def models(bench: Bench, real_models: tuple[Path, Path]) -> tuple[ArtifactRef, ArtifactRef]:
    """Both real models, uploaded."""
    old, new = [await bench.upload(await asyncio.to_thread(path.read_bytes)) for path in real_models]
    return old, new


Models = tuple[ArtifactRef, ArtifactRef]


async def test_a_release_is_signed_and_says_what_goes_in_and_out(
    bench: Bench, models: Models, real_models: tuple[Path, Path]
) -> None:
    release, created = await bench.publish("1.0", models[0])
    assert created
    envelope = bench.blobs.read(release.envelope.digest, 0, release.envelope.size)
    manifest = decode_manifest(verify(envelope, PAYLOAD_TYPE, (bench.signer.public_key,)))
    assert manifest == release.manifest
    (variant,) = manifest.variants.values()
    assert variant.files == {FILE: models[0]}
    session = onnxruntime.InferenceSession(str(real_models[0]))
    assert [tensor.name for tensor in variant.inputs] == [tensor.name for tensor in session.get_inputs()]
    assert [tensor.name for tensor in variant.outputs] == [tensor.name for tensor in session.get_outputs()]
    assert await bench.store.read(lambda tx: tx.releases.get(release.ref)) == release
    (entry,) = await bench.store.read(lambda tx: tx.journal.audit_before(None, 9))
    assert (entry.actor, entry.action, entry.subject) == ("ada", "release.publish", "magika@1.0")


async def test_publishing_the_same_again_changes_nothing(bench: Bench, models: Models) -> None:
    first, _ = await bench.publish("1.0", models[0])
    bench.clock.time += HOUR_S
    assert await bench.publish("1.0", models[0]) == (first, False)
    assert len(await bench.events("release.published")) == 1


async def test_a_version_that_exists_with_other_bytes_is_refused(bench: Bench, models: Models) -> None:
    first, _ = await bench.publish("1.0", models[0])
    with pytest.raises(Conflict, match=r"magika@1\.0 exists with other files") as refused:
        await bench.publish("1.0", models[1])
    assert refused.value.fix is not None and "new version" in refused.value.fix
    assert await bench.store.read(lambda tx: tx.releases.get(first.ref)) == first


async def test_of_those_who_publish_a_version_at_once_one_wins(bench: Bench, models: Models) -> None:
    same = await asyncio.gather(*(bench.publish("1.0", models[0]) for _ in range(4)))
    assert sorted(created for _, created in same) == [False, False, False, True]
    outcomes = await asyncio.gather(*(bench.publish("2.0", model) for model in models), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes if isinstance(outcome, FerryError)] == [Conflict]
    assert len(await bench.events("release.published")) == 2


async def test_a_file_must_be_uploaded_first(bench: Bench) -> None:
    with pytest.raises(NotFound) as refused:
        await bench.publish("1.0", ArtifactRef(ABSENT, 1))
    assert refused.value.field == "variants.default.model.onnx"
    assert refused.value.fix == f"upload the file first: PUT /v1/blobs/{ABSENT}"


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
async def test_what_is_no_complete_onnx_model_is_refused_by_its_place(
    bench: Bench, real_models: tuple[Path, Path], keep: int
) -> None:
    model = await asyncio.to_thread(real_models[0].read_bytes)
    truncated = await bench.upload(model[:keep])
    with pytest.raises(InvalidInput) as refused:
        await bench.publish("1.0", truncated)
    assert refused.value.field == "variants.default.model.onnx"
    assert refused.value.fix
    assert await bench.store.read(lambda tx: tx.releases.page(None, 9)) == []


@pytest.mark.parametrize(
    ("model", "version", "variants", "field"),
    [
        ("Magika", "1", {"default": {FILE: ABSENT}}, "model"),
        ("magika", "1/2", {"default": {FILE: ABSENT}}, "version"),
        ("magika", "1", {}, "variants"),
        ("magika", "1", {f"v{number}": {FILE: ABSENT} for number in range(17)}, "variants"),
        ("magika", "1", {"../up": {FILE: ABSENT}}, "variants"),
        ("magika", "1", {"auto": {FILE: ABSENT}}, "variants"),
        ("magika", "1", {"default": {}}, "variants.default"),
        ("magika", "1", {"default": {"a.onnx": ABSENT, "b.onnx": ABSENT}}, "variants.default"),
        ("magika", "1", {"default": {"../model.onnx": ABSENT}}, "variants.default"),
        ("magika", "1", {"default": {".onnx": ABSENT}}, "variants.default"),
        ("magika", "1", {"default": {FILE: Digest("sha256:short")}}, "variants.default.model.onnx"),
    ],
)
async def test_bad_names_are_refused_by_their_place(
    bench: Bench, model: str, version: str, variants: dict[str, dict[str, Digest]], field: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        await bench.releases.publish(ModelName(model), Version(version), variants, "ada")
    assert refused.value.field == field
    assert refused.value.fix


class FullDisk(LocalBlobs):
    """The kernel's own full disk, while `full`."""

    full = False

    def incoming_path(self) -> Path:
        path = super().incoming_path()
        if self.full:
            path.unlink()
            path.symlink_to("/dev/full")
        return path


async def test_a_full_disk_while_publishing_changes_nothing_and_may_be_tried_again(
    tmp_path: Path, real_models: tuple[Path, Path]
) -> None:
    blobs = FullDisk(tmp_path / "blobs")
    async for bench in open_bench(tmp_path, time.time(), blobs):
        model = await bench.upload(await asyncio.to_thread(real_models[0].read_bytes))
        blobs.full = True
        with pytest.raises(StorageFull):
            await bench.publish("1.0", model)
        assert await bench.store.read(lambda tx: tx.releases.page(None, 9)) == []
        blobs.full = False
        assert (await bench.publish("1.0", model))[1]


async def test_publishing_asks_for_patches_from_what_devices_run(bench: Bench, models: Models) -> None:
    await bench.publish("1.0", models[0])
    for name in ("alice", "bob"):
        await bench.join(name, models[0], CODECS)
    await bench.join("an-old-agent", models[0], ("codec-of-long-ago.1",))
    await bench.join("has-it-already", models[1], CODECS, "2.0-rc")
    await bench.publish("2.0", models[1])
    pending = await bench.store.read(lambda tx: tx.patches.pending(9))
    assert [(patch.base, patch.target, patch.codec) for patch in pending] == [
        (models[0].digest, models[1].digest, CODECS[0])
    ]


# Several files


async def upload_all(bench: Bench, *paths: Path) -> dict[str, Digest]:
    return {path.name: (await bench.upload(await asyncio.to_thread(path.read_bytes))).digest for path in paths}


async def list_of_parts(bench: Bench, file: ArtifactRef) -> ArtifactRef:
    known = await bench.store.read(lambda tx: tx.parts.get(file.digest))
    assert known is not None
    return known.index


def weights(*seeds: int) -> list["np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]:
    """100 kB for each seed."""
    return [np.random.default_rng(seed).standard_normal(25_000).astype(np.float32) for seed in seeds]


async def test_a_model_and_its_external_data_are_one_variant(bench: Bench, tmp_path: Path) -> None:
    files = await upload_all(bench, *save_with_data(tmp_path / "m", *weights(1, 2)))
    release, _ = await bench.releases.publish(MODEL, Version("1"), {"default": files}, "ada")
    variant = release.manifest.variants["default"]
    assert (variant.model, {name: file.digest for name, file in variant.files.items()}) == ("model.onnx", files)
    assert variant.size == sum(path.stat().st_size for path in (tmp_path / "m").iterdir())
    for file in variant.files.values():
        assert await bench.row_of(file) == file


async def test_parts_begin_where_the_tensors_of_a_data_file_do(bench: Bench, tmp_path: Path) -> None:
    both = []
    for version, seeds in (("1", (1, 2, 3)), ("2", (1, 7, 3))):
        files = await upload_all(bench, *save_with_data(tmp_path / version, *weights(*seeds)))
        release, _ = await bench.releases.publish(MODEL, Version(version), {"default": files}, "ada")
        data = release.manifest.variants["default"].files["model.onnx.data"]
        index = await list_of_parts(bench, data)
        encoded = bench.blobs.read(index.digest, 0, index.size)
        assert await bench.row_of(index) == index
        both.append(decode_index(encoded, data.size))
    assert missing_bytes(both[:1], both[1]) == 100_000


async def test_lists_of_parts_live_as_long_as_a_release_has_their_file(bench: Bench, tmp_path: Path) -> None:
    files = await upload_all(bench, *save_with_data(tmp_path / "m", *weights(1)))
    await bench.releases.publish(MODEL, Version("1"), {"default": files}, "ada")
    bench.clock.time += 2 * HOUR_S
    assert (await bench.releases.collect_garbage("ada", min_age_s=0)).count == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model.onnx.data": None}, "weights in 'model.onnx.data' are missing"),
        ({"extra.data": "model.onnx.data"}, "does not name the file 'extra.data'"),
        ({"model.onnx.data": "model.onnx"}, "reaches to byte 100000"),
        ({"second.onnx": "model.onnx"}, "2 ONNX files among 3"),
        ({"model.onnx": None, "m.pb": "model.onnx"}, "0 ONNX files among 2"),
    ],
)
async def test_files_that_do_not_belong_together_are_refused(
    bench: Bench, tmp_path: Path, change: dict[str, str | None], complaint: str
) -> None:
    uploaded = await upload_all(bench, *save_with_data(tmp_path / "m", *weights(1)))
    given = {name: uploaded[source] for name, source in change.items() if source is not None}
    files = {name: digest for name, digest in uploaded.items() if name not in change} | given
    with pytest.raises(InvalidInput, match=complaint) as refused:
        await bench.releases.publish(MODEL, Version("1"), {"default": files}, "ada")
    assert refused.value.field == "variants.default"
    assert refused.value.fix
    assert await bench.store.read(lambda tx: tx.releases.page(None, 9)) == []


async def test_patches_are_asked_for_file_by_file(bench: Bench, tmp_path: Path) -> None:
    old = await upload_all(bench, *save_with_data(tmp_path / "1", *weights(1, 2), name="old.onnx"))
    await bench.releases.publish(MODEL, Version("1.0"), {"default": old}, "ada")
    await bench.join("alice", ArtifactRef(old["old.onnx"], 0), CODECS)
    alice = await bench.store.read(lambda tx: tx.devices.get(DeviceId("alice")))
    assert alice is not None and alice.reported is not None
    holder = replace(alice, reported=replace(alice.reported, held=tuple(old.values())))
    await bench.store.write(lambda tx: tx.devices.put(holder))
    new = await upload_all(bench, *save_with_data(tmp_path / "2", *weights(1, 3), name="new.onnx"))
    await bench.releases.publish(MODEL, Version("2.0"), {"default": new}, "ada")
    pending = await bench.store.read(lambda tx: tx.patches.pending(9))
    assert {(patch.base, patch.target) for patch in pending} == {
        (old["old.onnx"], new["new.onnx"]),
        (old["old.onnx.data"], new["new.onnx.data"]),
    }


# Garbage collection


def patch_of(base: ArtifactRef, target: ArtifactRef, made: ArtifactRef) -> Patch:
    return Patch(base=base.digest, target=target.digest, codec=CODECS[0], state="ready", created_at=1.0, patch=made)


async def test_only_what_nobody_needs_is_collected(bench: Bench, models: Models) -> None:
    release, _ = await bench.publish("1.0", models[0])
    needed, stray = await bench.upload(b"a patch"), await bench.upload(b"a patch to nowhere")
    nowhere = ArtifactRef(ABSENT, 1)

    await bench.store.write(lambda tx: tx.patches.put(patch_of(models[1], models[0], needed)))
    await bench.store.write(lambda tx: tx.patches.put(patch_of(models[0], nowhere, stray)))
    bench.clock.time += 2 * HOUR_S
    fresh = await bench.upload(b"an upload whose release is about to be published")

    collected = await bench.releases.collect_garbage("ada", min_age_s=HOUR_S)
    assert collected == releases.Collected(2, models[1].size + stray.size)
    kept = {blob.artifact for blob in bench.blobs.all()}
    assert kept == {models[0], release.envelope, needed, fresh, await list_of_parts(bench, models[0])}
    assert await bench.store.read(lambda tx: tx.patches.for_target(ABSENT)) == []
    entry = (await bench.store.read(lambda tx: tx.journal.audit_before(None, 1)))[0]
    assert (entry.action, entry.detail) == ("garbage.collect", {"count": 2, "bytes": collected.bytes})


async def test_collecting_twice_finds_nothing_the_second_time(bench: Bench) -> None:
    await bench.upload(b"junk")
    bench.clock.time += HOUR_S
    assert (await bench.releases.collect_garbage("ada", min_age_s=0)).count == 1
    assert await bench.releases.collect_garbage("ada", min_age_s=0) == releases.Collected(0, 0)


async def test_bytes_whose_row_was_lost_in_a_crash_are_collected_once_they_are_old(bench: Bench) -> None:
    left_over = bench.blobs.put_bytes(b"written, then the power went")
    assert (await bench.releases.collect_garbage("ada", min_age_s=HOUR_S)).count == 0
    bench.clock.time += 2 * HOUR_S
    assert await bench.releases.collect_garbage("ada", min_age_s=HOUR_S) == releases.Collected(1, left_over.size)
    assert list(bench.blobs.all()) == []


async def test_an_upload_that_is_repeated_is_fresh_again(bench: Bench) -> None:
    await bench.upload(b"junk")
    bench.clock.time += 2 * HOUR_S
    await bench.upload(b"junk")
    assert (await bench.releases.collect_garbage("ada", min_age_s=HOUR_S)).count == 0


async def test_a_release_published_during_a_collection_has_its_bytes(
    bench: Bench, real_models: tuple[Path, Path]
) -> None:
    model = await asyncio.to_thread(real_models[0].read_bytes)
    published = 0
    for attempt in range(12):
        artifact = await bench.upload(model + renamed_producer(attempt))
        bench.clock.time += HOUR_S
        collecting = asyncio.create_task(bench.releases.collect_garbage("ada", min_age_s=0))
        for _ in range(attempt):
            await asyncio.sleep(0)
        try:
            release, _ = await bench.publish(f"{attempt}", artifact)
        except NotFound:
            await collecting
            continue
        await collecting
        published += 1
        for needed in (release.envelope, artifact):
            assert bench.blobs.find(needed.digest) == needed
            assert await bench.row_of(needed) == needed
    assert published < 12, "the collection never came first"


def renamed_producer(number: int) -> bytes:
    """A field to add to an ONNX file: the same model, other bytes (ModelProto.producer_name, field 2)."""
    return b"\x12\x02" + f"{number:02}".encode()


async def test_a_negative_age_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidInput, match="min_age_s"):
        await bench.releases.collect_garbage("ada", min_age_s=-1)
