"""Releases that keep answers, on the real engine: who gets which, what is counted, and what is never kept."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import tritonclient.http as triton

from common.artifact.serving import ServingChanges, ServingTerms
from edge_agent.inference.caching import ENTRY_BYTES
from edge_agent.inference.engine import EngineFailure
from edge_agent.inference.health import Health
from edge_agent.inference.http import ANSWERED_BY, CACHE, inference_app
from edge_agent.inference.listening import listen
from tests.conftest import eventually
from tests.integration.small_models import MODEL, Bench, adder, nan_unless_zero, noisy, raises_unless_zero

KEEPS = ServingTerms(cache_bytes=1_000_000)
ONES = np.ones((1, 4), np.float32)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, workers=1, queue=8)
    yield bench
    bench.engine.open.set()
    await bench.server.close()


async def serve(bench: Bench, number: int, serving: ServingTerms | None = KEEPS) -> None:
    await bench.put(str(number), lambda path: adder(path, number), serving=serving)
    await bench.server.commit(MODEL)


def runs(bench: Bench) -> int:
    return bench.engine.arrived


async def test_an_equal_request_is_answered_without_the_engine_and_counted_on_its_own(bench: Bench) -> None:
    await serve(bench, 10)
    first = await bench.server.infer(MODEL, None, {"x": ONES})
    before = runs(bench)
    second = await bench.server.infer(MODEL, None, {"x": ONES.copy()})
    here = await asyncio.to_thread(bench.server.infer_here, MODEL, None, {"x": ONES})
    there = await asyncio.wrap_future(bench.server.submit(MODEL, None, {"x": ONES}))
    assert runs(bench) == before
    assert [answer.recalled for answer in (first, second, here, there)] == [False, True, True, True]
    for answer in (first, second, here, there):
        np.testing.assert_array_equal(answer.outputs["y"], ONES + 10)
    counts = bench.server.served(MODEL).statistics
    assert (counts.answered, counts.hits, counts.misses) == (1, 3, 1)
    assert bench.server.health(MODEL) == Health(requests=1)
    (window,) = bench.recorder.cut(1.0)
    assert (window.requests, sum(window.latency_counts)) == (1, 1)


async def test_an_answer_from_memory_takes_no_core(bench: Bench) -> None:
    await serve(bench, 10)
    assert await bench.ask(5.0) == (10.0, "10")
    before = runs(bench)
    bench.engine.open.clear()
    blocked = asyncio.create_task(bench.ask(1.0))
    await eventually(lambda: runs(bench) > before, "the only core is busy")
    assert await bench.ask(5.0) == (10.0, "10")
    bench.engine.open.set()
    assert await blocked == (10.0, "10")


async def test_without_the_releases_word_nothing_is_kept_and_the_owner_has_the_last_one(tmp_path: Path) -> None:
    for terms, changes, kept in (
        (None, {}, False),
        (None, {MODEL: ServingChanges(cache_bytes=1_000_000)}, True),
        (KEEPS, {MODEL: ServingChanges(cache_bytes=0)}, False),
    ):
        bench = Bench(tmp_path, changes=changes)
        await serve(bench, 1, terms)
        answers = [await bench.server.infer(MODEL, None, {"x": ONES}) for _ in range(2)]
        assert [answer.recalled for answer in answers] == [False, kept]
        await bench.server.close()


async def test_a_swap_never_serves_the_old_releases_answer_and_a_roll_back_has_it_again(bench: Bench) -> None:
    await serve(bench, 1)
    assert await bench.ask() == (1.0, "1")
    await bench.put("2", lambda path: adder(path, 2), serving=KEEPS)
    assert await bench.ask() == (2.0, "2")
    assert await bench.ask() == (2.0, "2"), "from memory, in probation"
    assert await bench.ask(version="1") == (1.0, "1"), "from the old one's memory"
    before = runs(bench)
    await bench.server.revert(MODEL)
    assert await bench.ask() == (1.0, "1")
    assert runs(bench) == before


async def test_the_memory_of_a_closed_release_is_free_again(bench: Bench) -> None:
    await serve(bench, 1)
    old = bench.server._placements.of(MODEL).current
    await bench.ask()
    assert bench.server._recall.held(old)[0] == 1
    await serve(bench, 2)
    await eventually(lambda: bench.server._recall.held(old) == (0, 0), "the old release's answers are gone")


async def test_what_the_fallback_answered_for_a_failing_release_is_the_fallbacks(bench: Bench) -> None:
    await serve(bench, 1)
    await bench.put("2", raises_unless_zero, serving=KEEPS)
    answers = [await bench.ask() for _ in range(3)]
    assert answers == [(1.0, "1")] * 3
    assert bench.server.health(MODEL) == Health(requests=3, errors=3, consecutive=3), "each is asked of the new one"
    await bench.server.revert(MODEL)
    before = runs(bench)
    assert await bench.ask() == (1.0, "1")
    assert runs(bench) == before


async def test_failures_and_answers_that_are_not_finite_are_never_kept(bench: Bench) -> None:
    await bench.put("1", nan_unless_zero, serving=KEEPS)
    before = runs(bench)
    for _ in range(3):
        answer = await bench.server.infer(MODEL, None, {"x": ONES})
        assert not answer.recalled
        assert np.isnan(answer.outputs["y"]).all()
    assert runs(bench) == before + 3
    await bench.server.revert(MODEL)
    await bench.put("2", raises_unless_zero, serving=KEEPS)
    before = runs(bench)
    for _ in range(3):
        with pytest.raises(EngineFailure):
            await bench.ask()
    assert runs(bench) == before + 3


async def test_nobody_can_change_what_others_get(bench: Bench) -> None:
    await serve(bench, 10)
    asked = ONES.copy()
    first = await bench.server.infer(MODEL, None, {"x": asked})
    asked[:] = 7
    for answer in (first, await bench.server.infer(MODEL, None, {"x": ONES})):
        with pytest.raises(ValueError, match="read-only"):
            answer.outputs["y"][:] = 0
        answer.outputs.clear()
    third = await bench.server.infer(MODEL, None, {"x": ONES})
    np.testing.assert_array_equal(third.outputs["y"], ONES + 10)
    assert not (await bench.server.infer(MODEL, None, {"x": asked})).recalled


async def test_all_models_together_keep_no_more_than_the_device_allows(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cache_bytes_max=10 * ENTRY_BYTES)
    await serve(bench, 1)
    for value in range(50):
        await bench.ask(float(value))
    loaded = bench.server._placements.of(MODEL).current
    count, size = bench.server._recall.held(loaded)
    assert 0 < count < 10
    assert size <= 10 * ENTRY_BYTES
    await bench.server.close()


async def test_answers_given_in_a_batch_are_kept_one_by_one(bench: Bench) -> None:
    await bench.put("1", noisy, serving=KEEPS)
    await bench.server.commit(MODEL)
    values = [float(value) for value in range(6)]
    first = await asyncio.gather(*[bench.server.infer(MODEL, None, {"x": ONES * value}) for value in values])
    again = await asyncio.gather(*[bench.server.infer(MODEL, None, {"x": ONES * value}) for value in values])
    assert all(answer.recalled for answer in again)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.outputs["y"], other.outputs["y"])


async def test_callers_over_http_see_who_answered_and_a_client_sees_the_hits(bench: Bench) -> None:
    await serve(bench, 10)
    listener = await listen(inference_app(bench.server), "127.0.0.1", 0)
    document = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    seen = []
    async with aiohttp.ClientSession() as http:
        for _ in range(2):
            async with http.post(f"{listener.url}/v2/models/{MODEL}/infer", json=document) as response:
                body = await response.json()
                seen.append((response.headers[ANSWERED_BY], response.headers.get(CACHE), body["outputs"][0]["data"]))

    def statistics() -> dict[str, object]:
        with triton.InferenceServerClient(listener.url.removeprefix("http://")) as client:
            found: dict[str, object] = client.get_inference_statistics(MODEL)["model_stats"][0]
            return found

    stats = await asyncio.to_thread(statistics)
    await listener.close()
    assert seen == [("adder@10", None, [11, 12, 13, 14]), ("adder@10", "hit", [11, 12, 13, 14])]
    inference_stats = stats["inference_stats"]
    assert isinstance(inference_stats, dict)
    counted = {name: inference_stats[name]["count"] for name in ("success", "cache_hit", "cache_miss", "compute_infer")}
    assert counted == {"success": 2, "cache_hit": 1, "cache_miss": 1, "compute_infer": 1}
    assert stats["inference_count"] == 1
