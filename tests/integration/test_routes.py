"""Requests that are handed on by a release's rules, on the real engine: to whom, when, and when not."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from onnx import TensorProto

from common.artifact import TensorSpec
from common.artifact.serving import Route, ServingTerms
from common.errors import NotFound
from common.ids import ModelName, Version
from edge_agent.inference.http import ANSWERED_BY, inference_app
from edge_agent.inference.listening import listen
from edge_agent.inference.requests import Inference, Terms
from edge_agent.inference.router import RuleStatus
from edge_agent.inference.routing import HOPS_MAX
from tests.conftest import eventually
from tests.integration.small_models import MODEL, Bench, adder, identity, raises_unless_zero, renamed_output

SMALL, OTHER = ModelName("small"), ModelName("other")
ONES = np.ones((1, 4), np.float32)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, workers=1, queue=8)
    yield bench
    bench.engine.open.set()
    await bench.server.close()


def to(model: str, when: str) -> Route:
    return Route(when, ModelName(model))


async def serve(bench: Bench, model: ModelName, number: int, *routes: Route, cache_bytes: int = 0) -> None:
    terms = ServingTerms(cache_bytes, routes)
    await bench.put(str(number), lambda path: adder(path, number), model=model, serving=terms)
    await bench.server.commit(model)


async def ask(bench: Bench, rows: int = 1, **terms: Any) -> Inference:
    version = terms.pop("version", None)
    return await bench.server.infer(MODEL, version, {"x": np.ones((rows, 4), np.float32)}, terms=Terms(**terms))


def rules(bench: Bench, model: ModelName = MODEL) -> tuple[RuleStatus, ...]:
    (found,) = [one.routes for one in bench.server.kept_terms() if one.model == model]
    return found


async def test_the_first_rule_that_holds_says_who_answers(bench: Bench) -> None:
    await serve(
        bench,
        MODEL,
        1,
        to("small", 'input["x"].shape[0] > 4'),
        to("other", 'has(parameters.tier) && parameters.tier == "cheap"'),
        to("small", "priority > 7"),
    )
    await serve(bench, SMALL, 2)
    await serve(bench, OTHER, 3)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, MODEL),
        ({"rows": 5}, SMALL),
        ({"rows": 5, "parameters": {"tier": "cheap"}}, SMALL),
        ({"parameters": {"tier": "cheap"}}, OTHER),
        ({"parameters": {"tier": "dear"}}, MODEL),
        ({"priority": 8}, SMALL),
    ]
    numbers = {MODEL: 1, SMALL: 2, OTHER: 3}
    for request, model in cases:
        answer = await ask(bench, **request)
        assert (answer.model, answer.version) == (model, str(numbers[ModelName(model)]))
        assert float(answer.outputs["y"][0, 0]) == 1 + numbers[ModelName(model)]
    assert [rule.taken for rule in rules(bench)] == [2, 1, 1]


async def test_a_busy_device_hands_on_and_an_idle_one_does_not(bench: Bench) -> None:
    await serve(bench, MODEL, 1, to("small", "load.waiting >= 2 && load.busy == load.cores"))
    await serve(bench, SMALL, 2)
    before = bench.engine.arrived
    bench.engine.open.clear()
    first = asyncio.create_task(ask(bench))
    await eventually(lambda: bench.engine.arrived > before, "the only core is busy")
    rest = [asyncio.create_task(ask(bench)) for _ in range(4)]
    await asyncio.sleep(0.05)
    bench.engine.open.set()
    assert [(await task).model for task in (first, *rest)] == [MODEL, MODEL, MODEL, SMALL, SMALL]
    assert (await ask(bench)).model == MODEL


async def test_who_names_a_version_gets_it(bench: Bench) -> None:
    await serve(bench, MODEL, 1, to("small", "true"))
    await serve(bench, SMALL, 2)
    assert (await ask(bench)).model == SMALL
    assert (await ask(bench, version=Version("1"))).model == MODEL
    with pytest.raises(NotFound):
        await ask(bench, version=Version("2"))


async def test_callers_of_all_kinds_are_handed_on(bench: Bench) -> None:
    await serve(bench, MODEL, 1, to("small", "true"))
    await serve(bench, SMALL, 2)
    here = await asyncio.to_thread(bench.server.infer_here, MODEL, None, {"x": ONES})
    there = await asyncio.wrap_future(bench.server.submit(MODEL, None, {"x": ONES}))
    assert (here.model, there.model) == (SMALL, SMALL)


async def test_a_target_that_cannot_answer_is_passed_over_and_the_status_says_why(bench: Bench) -> None:
    await serve(bench, MODEL, 1, to("small", "true"), to("other", "true"), to("absent", "true"), to("adder", "true"))
    await bench.put("2", renamed_output, (TensorSpec("z", "FP32", (-1, 4)),), model=SMALL)
    wide = (TensorSpec("x", "FP32", (-1, 5)),), (TensorSpec("y", "FP32", (-1, 5)),)
    path = identity(bench.folder / "wide.onnx", TensorProto.FLOAT, ("n", 5))
    bench.server.switch(await bench.server.prepare(OTHER, Version("3"), path, *wide))
    answer = await ask(bench)
    assert (answer.model, float(answer.outputs["y"][0, 0])) == (MODEL, 2.0)
    said = [rule.skipped for rule in rules(bench)]
    assert said[0] == "small@2 has inputs or outputs of other names or types"
    assert said[2:] == ["absent is not served here", "leads back to adder"]
    assert [rule.taken for rule in rules(bench)] == [0, 0, 0, 0]
    await serve(bench, ModelName("absent"), 7)
    assert (await ask(bench)).model == "absent"


async def test_a_rule_that_cannot_be_evaluated_is_skipped_and_counted_and_the_next_is_tried(bench: Bench) -> None:
    await serve(
        bench,
        MODEL,
        1,
        to("small", "parameters.tier > 5"),
        to("small", "priority / 0 > 1"),
        to("small", "priority"),
        to("small", "oops("),
        to("other", "true"),
    )
    await serve(bench, SMALL, 2)
    await serve(bench, OTHER, 3)
    for _ in range(2):
        assert (await ask(bench, parameters={"tier": "x"})).model == OTHER
    one, two, three, four, last = rules(bench)
    assert [rule.failed for rule in (one, two, three, four, last)] == [2, 2, 2, 0, 0]
    assert "text" in one.failure
    assert "not true or false" in three.failure
    assert "line 1" in four.skipped
    assert last.taken == 2


async def test_requests_are_handed_on_only_so_often_and_never_back(bench: Bench) -> None:
    names = [MODEL, *(ModelName(f"m{number}") for number in range(HOPS_MAX + 2))]
    for number, (name, following) in enumerate(pairwise(names)):
        await serve(bench, name, number, to(following, "true"))
    await serve(bench, names[-1], 9)
    assert (await ask(bench)).model == names[HOPS_MAX]

    await serve(bench, names[1], 50, to(MODEL, "true"), to(names[2], "priority == 3"))
    assert (await ask(bench)).model == names[1], "not back to where it came from"
    assert (await ask(bench, priority=3)).model == names[HOPS_MAX], "a rule that leads back is passed over"


async def test_in_probation_the_target_s_fallback_stands_in_as_ever(bench: Bench) -> None:
    await serve(bench, MODEL, 1, to("small", "true"))
    await serve(bench, SMALL, 2)
    await bench.put("3", raises_unless_zero, model=SMALL)
    answer = await ask(bench)
    assert (answer.model, answer.version) == (SMALL, "2")
    assert bench.server.health(SMALL).errors == 1
    assert bench.server.health(MODEL).requests == 0


async def test_rules_come_and_go_with_their_release(bench: Bench) -> None:
    await serve(bench, SMALL, 2)
    await serve(bench, MODEL, 1)
    await bench.put("3", lambda path: adder(path, 3), serving=ServingTerms(routes=(to("small", "true"),)))
    assert (await ask(bench)).model == SMALL
    await bench.server.revert(MODEL)
    assert (await ask(bench)).model == MODEL


async def test_a_request_that_is_handed_on_is_looked_up_among_its_targets_answers(bench: Bench) -> None:
    await serve(bench, MODEL, 1, to("small", "priority == 9"), cache_bytes=1_000_000)
    await serve(bench, SMALL, 2, cache_bytes=1_000_000)
    answers = [await ask(bench, priority=priority) for priority in (1, 9, 1, 9)]
    assert [(one.model, one.recalled) for one in answers] == [
        (MODEL, False),
        (SMALL, False),
        (MODEL, True),
        (SMALL, True),
    ]


async def test_bad_input_is_an_error_of_the_model_that_was_asked(bench: Bench) -> None:
    await serve(bench, MODEL, 1, to("small", "true"))
    await serve(bench, SMALL, 2)
    with pytest.raises(Exception, match=r"inputs\.x: got FP32 \[1, 5\]"):
        await bench.server.infer(MODEL, None, {"x": np.zeros((1, 5), np.float32)})


async def test_an_answer_over_http_names_the_model_that_gave_it(bench: Bench) -> None:
    await serve(bench, MODEL, 1, to("small", "parameters.tier == 'cheap' && priority == 2"))
    await serve(bench, SMALL, 2)
    listener = await listen(inference_app(bench.server), "127.0.0.1", 0)
    document: dict[str, Any] = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    seen = []
    async with aiohttp.ClientSession() as http:
        for parameters in ({}, {"tier": "cheap", "priority": 2, "odd": {"deep": [1]}, "long": "x" * 10_000}):
            body = document | {"parameters": parameters}
            async with http.post(f"{listener.url}/v2/models/{MODEL}/infer", json=body) as response:
                answer = await response.json()
                seen.append((response.headers[ANSWERED_BY], answer["model_name"], answer["model_version"]))
    await listener.close()
    assert seen == [("adder@1", "adder", "1"), ("small@2", "small", "2")]


async def test_a_target_that_sleeps_is_woken_for_the_requests_to_come(bench: Bench) -> None:
    asked: list[ModelName] = []
    bench.server.waking.ask_for = asked.append
    await serve(bench, MODEL, 1, to("small", "priority > 7"))
    await serve(bench, SMALL, 2)
    await bench.server.rest(SMALL)
    assert "small is not in memory" in rules(bench)[0].skipped
    assert (await ask(bench)).model == MODEL
    await asyncio.sleep(0)
    assert asked == [], "the rule does not hold"
    for _ in range(3):
        assert (await ask(bench, priority=8)).model == MODEL
    await eventually(lambda: asked == [SMALL], "it is asked for once")
    await serve(bench, SMALL, 2)  # as whoever loads models does then
    assert (await ask(bench, priority=8)).model == SMALL
    assert [(rule.skipped, rule.taken) for rule in rules(bench)] == [("", 1)]
