"""Publishing on real models, and garbage collection beside it."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import onnxruntime
import pytest

from common.artifact.digest import digest_of
from common.artifact.manifest import PAYLOAD_TYPE, ArtifactRef, decode_manifest
from common.delta import CODECS
from common.errors import Conflict, FerryError, InvalidInput, NotFound, StorageFull
from common.ids import Digest, ModelName, Version
from common.trust import verify
from controller.registry import releases
from controller.registry.blobs import LocalBlobs
from controller.store.port import Patch
from tests.integration.registry_bench import FILE, Bench, open_bench

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
    await bench.join("has-it-already", models[1], CODECS)
    await bench.publish("2.0", models[1])
    pending = await bench.store.read(lambda tx: tx.patches.pending(9))
    assert [(patch.base, patch.target, patch.codec) for patch in pending] == [
        (models[0].digest, models[1].digest, CODECS[0])
    ]


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
    assert kept == {models[0], release.envelope, needed, fresh}
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
