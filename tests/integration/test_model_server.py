"""Serving and swapping on the real engine: what a caller sees while releases come, fail and go."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from common.artifact import TensorSpec
from common.clock import SystemClock
from common.errors import Conflict, InvalidInput, NotFound, Unavailable
from common.ids import ModelName, Version
from edge_agent.inference.engine import EngineFailure
from edge_agent.inference.health import Health, Verdict, judge
from edge_agent.inference.ort import OrtEngine
from edge_agent.inference.requests import Overloaded
from edge_agent.inference.serving import ModelServer
from edge_agent.inference.trial import ModelRejected
from edge_agent.telemetry.recorder import Recorder
from tests.conftest import eventually
from tests.integration.small_models import (
    MODEL,
    Bench,
    X,
    Y,
    adder,
    always_nan,
    identity,
    nan_unless_zero,
    raises_unless_zero,
    renamed_output,
)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, workers=2, queue=2)
    yield bench
    bench.engine.open.set()
    await bench.server.close()
    assert all(session.closed for session in bench.engine.sessions)
    assert not bench.engine.used_after_close


async def test_a_real_model_answers_as_the_raw_engine_does(real_models: tuple[Path, Path]) -> None:
    raw = OrtEngine().load(real_models[0])
    server = ModelServer(OrtEngine(), Recorder(0.0), SystemClock())
    candidate = await server.prepare(ModelName("magika"), Version("1"), real_models[0], raw.inputs, raw.outputs)
    server.switch(candidate)
    feeds = {"bytes": np.random.default_rng(1).integers(0, 256, (3, 2048), np.int32)}
    answer = await server.infer(ModelName("magika"), None, feeds)
    assert answer.version == "1"
    np.testing.assert_array_equal(answer.outputs["target_label"], raw.run(feeds, ["target_label"])["target_label"])
    await server.close()
    raw.close()


async def test_no_request_fails_and_every_answer_is_of_one_release_while_models_are_swapped(tmp_path: Path) -> None:
    """Hundreds of swaps under traffic, a third of them undone."""
    bench = Bench(tmp_path, workers=2, queue=64)
    chance = random.Random(20)
    await bench.add(0)
    answers: list[tuple[float, str]] = []
    done = False

    async def client() -> None:
        while not done:
            answers.append(await bench.ask(chance.random()))
            await asyncio.sleep(0.003)  # a release is prepared with the lowest priority: leave it something

    clients = [asyncio.create_task(client()) for _ in range(8)]
    for number in range(1, 201):
        await bench.put(str(number), lambda path, number=number: adder(path, number))  # type: ignore[misc]
        answers.append(await bench.ask())  # behind what the clients have queued
        await (bench.server.revert(MODEL) if chance.random() < 1 / 3 else bench.server.commit(MODEL))
    done = True
    await asyncio.gather(*clients)  # raises if any request failed
    assert {version for number, version in answers if round(number) != int(version)} == set()
    assert len({version for _, version in answers}) > 130
    await bench.server.close()
    assert len(bench.engine.sessions) == 201
    assert all(session.closed for session in bench.engine.sessions)
    assert not bench.engine.used_after_close


@pytest.mark.parametrize("broken", [nan_unless_zero, raises_unless_zero])
async def test_a_broken_release_in_probation_is_never_seen_by_callers(bench: Bench, broken: object) -> None:
    await bench.add(1)
    await bench.put("2", broken)  # type: ignore[arg-type]
    answers = [await bench.ask() for _ in range(5)]
    assert answers == [(1.0, "1")] * 5
    assert bench.server.health(MODEL) == Health(requests=5, errors=5, consecutive=5)
    assert judge(bench.server.health(MODEL)) is Verdict.FAIL
    await bench.server.revert(MODEL)
    assert await bench.ask() == (1.0, "1")
    assert bench.versions() == ["1"]


async def test_telemetry_blames_the_new_release_and_credits_the_old_one(bench: Bench) -> None:
    await bench.add(1)
    await bench.put("2", raises_unless_zero)
    await bench.ask()
    one, two = bench.recorder.cut(1.0)
    assert (one.version, one.requests, one.errors, sum(one.latency_counts)) == ("1", 1, 0, 1)
    assert (two.version, two.requests, two.errors, sum(two.latency_counts)) == ("2", 1, 1, 0)


async def test_an_input_that_both_releases_fail_on_is_no_evidence_against_the_new_one(bench: Bench) -> None:
    await bench.put("1", raises_unless_zero)
    await bench.server.commit(MODEL)
    await bench.put("2", raises_unless_zero)
    with pytest.raises(EngineFailure):
        await bench.ask()
    assert bench.server.health(MODEL) == Health()
    assert judge(bench.server.health(MODEL)) is Verdict.INCONCLUSIVE


async def test_a_release_with_other_outputs_is_judged_though_the_old_one_cannot_stand_in(bench: Bench) -> None:
    await bench.add(1)
    await bench.put("2", renamed_output, (TensorSpec("z", "FP32", (-1, 4)),))
    with pytest.raises(EngineFailure):
        await bench.ask()
    assert bench.server.health(MODEL).errors == 1
    await bench.server.revert(MODEL)
    assert await bench.ask() == (1.0, "1")


async def test_a_named_version_answers_itself_or_not_at_all(bench: Bench) -> None:
    await bench.add(1)
    await bench.put("2", raises_unless_zero)
    assert await bench.ask(version="1") == (1.0, "1")
    with pytest.raises(EngineFailure, match="out of"):
        await bench.ask(version="2")
    with pytest.raises(NotFound, match="'3'"):
        await bench.ask(version="3")
    await bench.server.revert(MODEL)
    with pytest.raises(NotFound):
        await bench.ask(version="2")


async def test_requests_in_flight_finish_on_the_session_they_started_with(bench: Bench) -> None:
    await bench.add(1)
    arrived = bench.engine.arrived
    bench.engine.open.clear()
    early = asyncio.create_task(bench.ask())
    await eventually(lambda: bench.engine.arrived > arrived, "the request is inside the session")
    bench.engine.open.set()
    await early  # the warm-up of the next release needs the door open
    await bench.put("2", lambda path: adder(path, 2))
    arrived = bench.engine.arrived
    bench.engine.open.clear()
    late = asyncio.create_task(bench.ask())
    await eventually(lambda: bench.engine.arrived > arrived, "the request is inside the new session")
    reverting = asyncio.create_task(bench.server.revert(MODEL))
    await asyncio.sleep(0)
    assert not reverting.done()
    assert [session.closed for session in bench.engine.sessions] == [False, False]
    bench.engine.open.set()
    assert await late == (2.0, "2")
    await reverting
    assert [session.closed for session in bench.engine.sessions] == [False, True]
    assert await bench.ask() == (1.0, "1")


async def test_a_caller_who_gives_up_does_not_close_the_session_under_the_engine(bench: Bench) -> None:
    await bench.add(1)
    arrived = bench.engine.arrived
    bench.engine.open.clear()
    impatient = asyncio.create_task(bench.ask())
    await eventually(lambda: bench.engine.arrived > arrived, "the request is inside the session")
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    retiring = asyncio.create_task(bench.server.retire(MODEL))
    await asyncio.sleep(0)
    assert not bench.engine.sessions[0].closed
    bench.engine.open.set()
    await retiring
    assert bench.engine.sessions[0].closed


async def test_a_full_queue_refuses_at_once_and_recovers(bench: Bench) -> None:
    await bench.add(1)
    arrived = bench.engine.arrived
    bench.engine.open.clear()
    accepted = [asyncio.create_task(bench.ask()) for _ in range(2)]
    await eventually(lambda: bench.engine.arrived == arrived + 2, "both workers are busy")
    accepted += [asyncio.create_task(bench.ask()) for _ in range(2)]  # two places in the queue
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="try again"):
        await bench.ask()
    bench.engine.open.set()
    assert await asyncio.gather(*accepted) == [(1.0, "1")] * 4
    assert await bench.ask() == (1.0, "1")


async def test_a_first_release_that_is_reverted_leaves_the_model_out_of_service(bench: Bench) -> None:
    await bench.put("1", lambda path: adder(path, 1))
    await bench.server.revert(MODEL)
    with pytest.raises(NotFound, match="none yet"):
        await bench.ask()


async def test_switches_are_settled_one_at_a_time(bench: Bench) -> None:
    await bench.put("1", lambda path: adder(path, 1))
    candidate = await bench.server.prepare(MODEL, Version("2"), adder(bench.folder / "2.onnx", 2), X, Y)
    with pytest.raises(Conflict, match="probation"):
        bench.server.switch(candidate)
    await bench.server.commit(MODEL)
    with pytest.raises(Conflict, match="committed"):
        await bench.server.revert(MODEL)
    await bench.server.commit(MODEL)  # again: nothing to do
    await bench.server.discard(candidate)
    assert await bench.ask() == (1.0, "1")


async def test_probes_judge_a_release_that_nobody_calls_and_stay_out_of_the_counts(bench: Bench) -> None:
    await bench.put("1", lambda path: adder(path, 1))
    assert await bench.server.self_probe(MODEL, 25) == Health(requests=25)
    assert bench.server.health(MODEL) == Health()
    assert bench.recorder.cut(1.0) == []


async def test_health_counts_requests_since_the_switch(bench: Bench) -> None:
    await bench.add(1)
    await bench.ask()
    await bench.put("2", lambda path: adder(path, 2))
    assert bench.server.health(MODEL) == Health()
    await bench.ask()
    assert bench.server.health(MODEL) == Health(requests=1)


async def test_outputs_can_be_picked_and_bad_feeds_name_tensor_and_expectation(bench: Bench) -> None:
    await bench.add(1)
    good = {"x": np.zeros((1, 4), np.float32)}
    answer = await bench.server.infer(MODEL, None, good, ["y"])
    assert list(answer.outputs) == ["y"]
    cases: list[tuple[dict[str, np.ndarray], list[str] | None, str]] = [
        ({}, None, r"inputs\.x: this input is missing \(send FP32 \[any, 4\]\)"),
        ({"x": np.zeros((1, 5), np.float32)}, None, r"inputs\.x: got FP32 \[1, 5\] \(send FP32 \[any, 4\]\)"),
        ({"x": np.zeros(4, np.float32)}, None, r"got FP32 \[4\]"),
        ({"x": np.zeros((1, 4))}, None, r"got FP64 \[1, 4\]"),
        ({**good, "w": good["x"]}, None, r"inputs\.w: the model has no such input \(it takes x\)"),
        (good, ["z"], r"outputs\.z: the model has no such output \(it has y\)"),
    ]
    for feeds, outputs, message in cases:
        with pytest.raises(InvalidInput, match=message):
            await bench.server.infer(MODEL, None, feeds, outputs)
    assert [window.errors for window in bench.recorder.cut(1.0)] == [0]


async def test_a_release_that_is_not_what_its_manifest_says_is_rejected(bench: Bench) -> None:
    path = adder(bench.folder / "1.onnx", 1)
    wrong: list[tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], str]] = [
        ((TensorSpec("other", "FP32", (-1, 4)),), Y, "'other' is in the manifest and not in the model"),
        ((), Y, "'x' is in the model and not in the manifest"),
        ((TensorSpec("x", "INT32", (-1, 4)),), Y, r"FP32 \[any, 4\] in the model and INT32 \[any, 4\] in the manifest"),
        (X, (TensorSpec("y", "FP32", (-1, 5)),), r"output 'y'"),
        (X, (TensorSpec("y", "BF16", (-1, 4)),), "type BF16"),
    ]
    for inputs, outputs, message in wrong:
        with pytest.raises(ModelRejected, match=message):
            await bench.server.prepare(MODEL, Version("1"), path, inputs, outputs)
    assert bench.versions() == []


async def test_what_is_no_model_or_answers_nonsense_is_rejected_and_what_is_no_verdict_is_not(bench: Bench) -> None:
    junk = bench.folder / "junk.onnx"
    junk.write_bytes(b"not a model" * 100)
    with pytest.raises(ModelRejected, match=r"cannot load junk\.onnx"):
        await bench.server.prepare(MODEL, Version("1"), junk, X, Y)
    truncated = bench.folder / "truncated.onnx"
    truncated.write_bytes(adder(bench.folder / "whole.onnx", 1).read_bytes()[:-20])
    with pytest.raises(ModelRejected):
        await bench.server.prepare(MODEL, Version("1"), truncated, X, Y)
    with pytest.raises(ModelRejected, match="'y' is not finite"):
        await bench.server.prepare(MODEL, Version("1"), always_nan(bench.folder / "nan.onnx"), X, Y)
    with pytest.raises(NotFound):
        await bench.server.prepare(MODEL, Version("1"), bench.folder / "absent.onnx", X, Y)


@pytest.mark.parametrize(
    ("element", "datatype", "shape"),
    [
        (TensorProto.STRING, "BYTES", ("n", 2)),
        (TensorProto.BOOL, "BOOL", (3,)),
        (TensorProto.FLOAT16, "FP16", ("n", "m")),
        (TensorProto.UINT64, "UINT64", ()),
        (TensorProto.INT8, "INT8", (2, 2)),
    ],
)
async def test_every_type_is_warmed_up_and_served(
    tmp_path: Path, element: int, datatype: str, shape: tuple[int | str, ...]
) -> None:
    server = ModelServer(OrtEngine(), Recorder(0.0), SystemClock(), workers=1)
    axes = tuple(axis if isinstance(axis, int) else -1 for axis in shape)
    path = identity(tmp_path / "identity.onnx", element, shape)
    inputs, outputs = (TensorSpec("x", datatype, axes),), (TensorSpec("y", datatype, axes),)
    server.switch(await server.prepare(MODEL, Version("1"), path, inputs, outputs))
    assert (await server.self_probe(MODEL, 3)).healthy == 3
    await server.close()


async def test_a_stopping_server_answers_what_it_accepted_and_refuses_the_rest(bench: Bench) -> None:
    await bench.add(1)
    arrived = bench.engine.arrived
    bench.engine.open.clear()
    accepted = asyncio.create_task(bench.ask())
    await eventually(lambda: bench.engine.arrived > arrived, "the request is inside the session")
    closing = asyncio.create_task(bench.server.close())
    await asyncio.sleep(0)
    assert not bench.server.ready
    with pytest.raises((NotFound, Unavailable)):
        await bench.ask()
    bench.engine.open.set()
    assert await accepted == (1.0, "1")
    await closing
