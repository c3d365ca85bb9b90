"""Publishing a release with samples: they are signed with it, and what a device would refuse is refused here."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from common.artifact import ArtifactRef, ReleaseManifest, decode_manifest, digest_of
from common.artifact.manifest import PAYLOAD_TYPE
from common.artifact.samples import SAMPLES_BYTES_MAX, Sample, encode_samples
from common.artifact.selftest import SAMPLES_FILE, Close, Exact, Rule, SelfTest
from common.errors import Conflict, InvalidInput, NotFound, TooLarge
from common.ids import Digest, Version
from common.trust import verify
from controller.registry.patch_facts import data_file
from controller.resources import GivenSelfTest
from controller.store.port import Release
from tests.integration.api_peer import serving
from tests.integration.registry_bench import FILE, MODEL, Bench, open_bench

OUTPUT = "target_label"
NEAR: dict[str, Rule] = {OUTPUT: Close(rtol=1e-3, atol=1e-4)}
HOUR_S = 3600.0


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async for made in open_bench(tmp_path, time.time()):
        yield made


@pytest.fixture
async def model(bench: Bench, real_models: tuple[Path, Path]) -> ArtifactRef:
    return await bench.upload(real_models[0].read_bytes())


def sample(value: float = 0.5, width: int = 214) -> Sample:
    return Sample("one", {"bytes": np.zeros((1, 2048), np.int32)}, {OUTPUT: np.full((1, width), value, np.float32)})


async def publish(
    bench: Bench,
    model: ArtifactRef,
    samples: Digest | None,
    rules: dict[str, Rule] | None = None,
    latency_max_s: float | None = None,
    variant: str = "default",
) -> tuple[Release, bool]:
    given = samples and GivenSelfTest(samples=samples, rules=rules or NEAR, latency_max_s=latency_max_s)
    tests = {variant: given} if given else {}
    return await bench.releases.publish(MODEL, Version("1"), {"default": {FILE: model.digest}}, "ada", tests)


async def test_samples_are_a_file_of_the_signed_release(bench: Bench, model: ArtifactRef) -> None:
    samples = await bench.upload(encode_samples([sample()]))
    release, _ = await publish(bench, model, samples.digest, latency_max_s=0.2)
    envelope = bench.blobs.read(release.envelope.digest, 0, release.envelope.size)
    (variant,) = signed(bench, envelope).variants.values()
    assert variant.files == {FILE: model, SAMPLES_FILE: samples}
    assert variant.self_test == SelfTest(samples=SAMPLES_FILE, count=1, rules=NEAR, latency_max_s=0.2)


def signed(bench: Bench, envelope: bytes) -> ReleaseManifest:
    return decode_manifest(verify(envelope, PAYLOAD_TYPE, (bench.signer.public_key,)))


async def test_a_release_is_another_one_with_other_samples_or_rules(bench: Bench, model: ArtifactRef) -> None:
    samples = (await bench.upload(encode_samples([sample()]))).digest
    others = (await bench.upload(encode_samples([sample(0.25)]))).digest
    release, created = await publish(bench, model, samples)
    assert created
    assert await publish(bench, model, samples) == (release, False)
    with pytest.raises(Conflict, match="self-test"):
        await publish(bench, model, None)
    with pytest.raises(Conflict):
        await publish(bench, model, others)
    with pytest.raises(Conflict):
        await publish(bench, model, samples, {OUTPUT: Exact()})
    with pytest.raises(Conflict):
        await publish(bench, model, samples, latency_max_s=1.0)


async def test_samples_stay_as_long_as_their_release_does(bench: Bench, model: ArtifactRef) -> None:
    samples = await bench.upload(encode_samples([sample()]))
    unused = await bench.upload(encode_samples([sample(0.25)]))
    await publish(bench, model, samples.digest)
    bench.clock.time += HOUR_S
    await bench.releases.collect_garbage("ada", 60.0)
    assert await bench.row_of(samples) == samples
    assert await bench.row_of(unused) is None


async def test_samples_are_patched_for_what_they_are_and_not_as_weights(bench: Bench, model: ArtifactRef) -> None:
    samples = await bench.upload(encode_samples([sample()]))
    await publish(bench, model, samples.digest)
    assert await bench.store.read(lambda tx: data_file(tx, samples.digest)) is None


BAD: dict[str, tuple[bytes, dict[str, Rule], str]] = {
    "no samples at all": (b"PK\x03\x04", NEAR, "samples"),
    "cut off": (encode_samples([sample()])[:-1], NEAR, "samples"),
    "none": (encode_samples([]), NEAR, "samples"),
    "another model's output": (encode_samples([sample(width=7)]), NEAR, f"samples.one.outputs.{OUTPUT}"),
    "not finite": (encode_samples([sample(np.inf)]), NEAR, f"samples.one.outputs.{OUTPUT}"),
    "a rule for nothing": (encode_samples([sample()]), {"logits": Exact()}, "rules.logits"),
}


@pytest.mark.parametrize("name", BAD)
async def test_samples_that_a_device_would_refuse_are_refused_by_name(
    bench: Bench, model: ArtifactRef, name: str
) -> None:
    data, rules, field = BAD[name]
    samples = await bench.upload(data)
    with pytest.raises(InvalidInput) as refused:
        await publish(bench, model, samples.digest, rules)
    assert refused.value.field == f"self_tests.default.{field}"
    assert await bench.events("release.published") == []


async def test_samples_have_limits_and_must_be_there_and_belong_to_a_variant(bench: Bench, model: ArtifactRef) -> None:
    large = await bench.upload(bytes(SAMPLES_BYTES_MAX + 1))
    with pytest.raises(TooLarge, match="fewer or smaller"):
        await publish(bench, model, large.digest)
    with pytest.raises(NotFound) as absent:
        await publish(bench, model, digest_of(b"never uploaded"))
    assert absent.value.field == "self_tests.default.samples"
    good = await bench.upload(encode_samples([sample()]))
    with pytest.raises(InvalidInput, match="no such variant"):
        await publish(bench, model, good.digest, variant="int8")


async def test_the_api_takes_a_self_test_and_shows_it(tmp_path: Path, real_models: tuple[Path, Path]) -> None:
    async with serving(tmp_path) as api:
        model = await api.upload(real_models[0].read_bytes())
        samples = await api.upload(encode_samples([sample()]))
        rules = {OUTPUT: {"rule": "close", "rtol": 0.001, "atol": 0.5}}
        body = {
            "model": "magika",
            "version": "1",
            "variants": {"default": {FILE: model}},
            "self_tests": {"default": {"samples": samples, "rules": rules}},
        }
        reply = await api.ask("POST", "/v1/releases", json=body)
        assert reply.status == 201, reply.body
        shown = (await api.ask("GET", "/v1/releases/magika/1")).json()["manifest"]["variants"]["default"]
        assert shown["self_test"] == {"samples": SAMPLES_FILE, "count": 1, "rules": rules}
        rules[OUTPUT]["rule"] = "nearly"
        reply = await api.ask("POST", "/v1/releases", json={**body, "version": "2"})
        assert reply.status == 400
        assert reply.problem()["field"].startswith("self_tests")
