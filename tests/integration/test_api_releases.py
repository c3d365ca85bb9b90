"""Releases over HTTP: published once, immutable, listed in pages, with errors that say what to do."""

import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from common.artifact import digest_of
from common.ids import DeviceId, Digest, ModelName, Version
from common.wire import TelemetryWindow
from controller.store.port import Patch, Transaction
from tests.integration.api_peer import ApiPeer, serving, tiny_model
from tests.small_models import save_with_data


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[ApiPeer]:
    async with serving(tmp_path) as peer:
        yield peer


def of(digest: str, version: str = "1.0.0") -> dict[str, object]:
    return {"model": "detector", "version": version, "variants": {"default": {"m.onnx": digest}}}


async def test_a_release_is_published_once_and_the_same_again_changes_nothing(api: ApiPeer) -> None:
    first, again = (
        await api.publish("detector", "1.0.0", tiny_model()),
        await api.publish("detector", "1.0.0", tiny_model()),
    )
    shown = await api.ask("GET", "/v1/releases/detector/1.0.0")
    assert (first.status, again.status, shown.status) == (201, 200, 200)
    assert first.body == again.body == shown.body
    tensors = shown.json()["manifest"]["variants"]["default"]["inputs"]
    assert tensors == [{"name": "x", "datatype": "FP32", "shape": [1]}]
    assert (await api.ask("GET", f"/v1/blobs/{shown.json()['envelope']['digest']}")).status == 200


async def test_the_same_version_with_other_bytes_is_a_conflict(api: ApiPeer) -> None:
    await api.publish("detector", "1.0.0", tiny_model(1))
    other = await api.publish("detector", "1.0.0", tiny_model(2))
    problem = other.problem()
    assert (other.status, problem["code"], problem["field"]) == (409, "conflict", "version")
    assert "new version" in problem["fix"]


async def test_a_release_of_a_blob_that_was_not_uploaded_is_refused_with_the_digest(api: ApiPeer) -> None:
    digest = digest_of(b"nowhere")
    problem = (await api.ask("POST", "/v1/releases", json=of(digest))).problem()
    assert problem["code"] == "not_found"
    assert digest in problem["detail"]
    assert "PUT /v1/blobs" in problem["fix"]


async def test_a_file_that_is_not_onnx_is_refused(api: ApiPeer) -> None:
    reply = await api.publish("detector", "1.0.0", b"PK\x03\x04 certainly a zip file" * 10)
    problem = reply.problem()
    assert (reply.status, problem["code"]) == (400, "invalid_input")
    assert problem["field"].startswith("variants.default")
    assert (await api.ask("GET", "/v1/releases/detector/1.0.0")).status == 404


async def test_a_model_is_published_with_the_files_that_it_names_and_no_others(api: ApiPeer, tmp_path: Path) -> None:
    model, data = save_with_data(tmp_path / "m", np.ones(50_000, np.float32))
    files = {path.name: await api.upload(path.read_bytes()) for path in (model, data)}
    release = {"model": "detector", "version": "1", "variants": {"default": files}}
    published = await api.ask("POST", "/v1/releases", json=release)
    assert published.status == 201
    variant = published.json()["manifest"]["variants"]["default"]
    assert {name: file["digest"] for name, file in variant["files"].items()} == files
    for spoiled in ({model.name: files[model.name]}, {**files, "more.data": files[data.name]}):
        reply = await api.ask("POST", "/v1/releases", json={**release, "version": "2", "variants": {"v": spoiled}})
        assert (reply.status, reply.problem()["field"]) == (400, "variants.v")
        assert reply.problem()["fix"]


@pytest.mark.parametrize("name", ["../m.onnx", "/etc/m.onnx", "a/m.onnx", "..", ".m.onnx", "m.onnx\n", ""])
async def test_a_file_name_that_leads_elsewhere_is_refused(api: ApiPeer, name: str) -> None:
    files = {name: await api.upload(tiny_model())}
    release = {"model": "detector", "version": "1", "variants": {"default": files}}
    reply = await api.ask("POST", "/v1/releases", json=release)
    assert (reply.status, reply.problem()["field"]) == (400, "variants.default")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "Detector"}, "model"),
        ({"version": ""}, "version"),
        ({"variants": {}}, "variants"),
        ({"variants": {"default": {"m.onnx": "sha256:short"}}}, "variants.default.m.onnx"),
        ({"modell": "typo"}, "body"),
        ({"model": 7}, "model"),
    ],
)
async def test_a_bad_field_is_named(api: ApiPeer, change: dict[str, object], field: str) -> None:
    reply = await api.ask("POST", "/v1/releases", json={**of(digest_of(b"x")), **change})
    problem = reply.problem()
    assert (reply.status, problem["field"]) == (400, field)
    assert problem["fix"]


async def test_an_unknown_model_is_404_with_what_to_do(api: ApiPeer) -> None:
    problem = (await api.ask("GET", "/v1/releases/detector/9")).problem()
    assert (problem["code"], problem["field"]) == ("not_found", "release")
    assert "ferry release list" in problem["fix"]


async def test_releases_are_listed_in_pages_without_gaps(api: ApiPeer) -> None:
    names = [("a", "1"), ("a", "2"), ("b", "1"), ("b", "10")]
    for number, (model, version) in enumerate(names):
        await api.publish(model, version, tiny_model(number))
    seen: list[tuple[str, str]] = []
    after: str | None = ""
    while after is not None:
        page = (
            await api.ask("GET", "/v1/releases", params={"limit": "3", **({"after": after} if after else {})})
        ).json()
        seen += [(item["model"], item["version"]) for item in page["items"]]
        after = page["next"]
    of_b = (await api.ask("GET", "/v1/releases?model=b")).json()["items"]
    assert seen == names
    assert [item["version"] for item in of_b] == ["1", "10"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("after=nonsense", "after"),
        ("limit=1&limit=2", "limit"),
        ("x=1", "query"),
    ],
)
async def test_a_bad_page_is_400_and_names_the_parameter(api: ApiPeer, query: str, field: str) -> None:
    reply = await api.ask("GET", f"/v1/releases?{query}")
    assert (reply.status, reply.problem()["field"]) == (400, field)


async def test_patches_to_an_artifact_are_listed_with_their_state(api: ApiPeer) -> None:
    base, target = digest_of(b"a"), digest_of(b"b")
    patch = Patch(base=base, target=target, codec="c.1", state="not_worth", created_at=1.0, reason="too large")
    await api.store.write(lambda tx: tx.patches.put(patch))
    items = (await api.ask("GET", "/v1/patches", params={"target": target})).json()["items"]
    assert [(item["base"], item["state"], item["reason"]) for item in items] == [(base, "not_worth", "too large")]


async def test_garbage_collection_removes_what_nobody_needs_and_nothing_else(api: ApiPeer) -> None:
    kept = Digest(digest_of(tiny_model()))
    await api.publish("detector", "1.0.0", tiny_model())
    stray = await api.upload(b"stray")
    young = await api.ask("POST", "/v1/gc", json={"min_age_s": 3600})
    removed = await api.ask("POST", "/v1/gc", json={"min_age_s": 0})
    assert young.json() == {"count": 0, "bytes": 0}
    assert removed.json() == {"count": 1, "bytes": 5}
    assert (await api.ask("HEAD", f"/v1/blobs/{stray}")).status == 404
    assert (await api.ask("HEAD", f"/v1/blobs/{kept}")).status == 200


async def test_what_devices_measured_is_summed_up_per_release(api: ApiPeer) -> None:
    await api.publish("detector", "1.0.0", tiny_model())
    url = "/v1/releases/detector/1.0.0/telemetry"
    nothing = (await api.ask("GET", url)).json()
    assert (nothing["devices"], nothing["requests"], nothing["p99_s"]) == (0, 0, None)
    now = time.time()
    for device, requests in (("a", 30), ("b", 70)):
        await api.store.write(partial(add_window, device=DeviceId(device), requests=requests, now=now))
    measured = (await api.ask("GET", url)).json()
    assert (measured["devices"], measured["requests"], measured["errors"]) == (2, 100, 2)
    assert 0.005 < measured["p50_s"] <= measured["p99_s"] <= 0.01
    assert (await api.ask("GET", "/v1/releases/detector/9/telemetry")).status == 404


def add_window(tx: Transaction, device: DeviceId, requests: int, now: float) -> None:
    window = TelemetryWindow(
        model=ModelName("detector"),
        version=Version("1.0.0"),
        started_at=now - 10,
        ended_at=now,
        requests=requests,
        errors=1,
        latency_counts=(*(0,) * 6, requests, *(0,) * 10),
        latency_sum_s=0.5,
    )
    tx.telemetry.add(device, [window])
