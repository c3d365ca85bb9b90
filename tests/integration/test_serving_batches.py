"""Competing callers on the real engine: who shares a batch, who goes first, who is sent away, and nobody notices."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from common.artifact import TensorSpec
from common.errors import DeadlineExceeded
from common.ids import Version
from edge_agent.inference.batching import TRIALS
from edge_agent.inference.engine import EngineFailure
from edge_agent.inference.requests import Overloaded, Terms
from tests.conftest import eventually
from tests.integration.small_models import (
    MODEL,
    Bench,
    adder,
    centred,
    endless_unless_zero,
    identity,
    raises_unless_zero,
)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, workers=1, queue=32)
    yield bench
    bench.engine.open.set()
    await bench.server.close()


async def serve(bench: Bench, make: Callable[[Path], Path]) -> None:
    await bench.put("1", make)
    await bench.server.commit(MODEL)


async def ask(bench: Bench, value: float, **terms: float) -> float:
    """The answer to one row of `value`: its first element."""
    feeds = {"x": np.full((1, 4), value, np.float32)}
    answer = await bench.server.infer(MODEL, None, feeds, terms=Terms(**terms))  # type: ignore[arg-type]
    assert answer.outputs["y"].shape == (1, 4)
    return float(answer.outputs["y"][0, 0])


async def competing(bench: Bench, *requests: Callable[[], "asyncio.Task[float]"]) -> list["asyncio.Task[float]"]:
    """Requests that all wait while another one holds the only core."""
    arrived = bench.engine.arrived
    bench.engine.open.clear()
    first = asyncio.create_task(ask(bench, 0.0))
    await eventually(lambda: bench.engine.arrived > arrived, "the core is busy")
    tasks = [request() for request in requests]
    await asyncio.sleep(0.01)
    bench.engine.rows.clear()
    bench.engine.open.set()
    await first
    return tasks


async def burst(bench: Bench, *values: float) -> list[float | BaseException]:
    """The answers to requests that competed, in their order."""
    requests = [lambda value=value: asyncio.create_task(ask(bench, value)) for value in values]
    return await asyncio.gather(*await competing(bench, *requests), return_exceptions=True)


async def proven(bench: Bench) -> None:
    """Let the server find out whether rows may be joined."""
    for _ in range(TRIALS):
        assert len(await burst(bench, 1.0, 2.0)) == 2


async def test_competing_callers_share_batches_and_each_gets_its_own_answer(bench: Bench) -> None:
    await serve(bench, lambda path: adder(path, 10))
    values = [float(value) for value in range(16)]
    for _ in range(30):
        assert await burst(bench, *values) == [value + 10 for value in values]
    assert max(bench.engine.rows) > 1, "by now batches are proven and tried"
    statistics = bench.server.served(MODEL).statistics
    assert statistics.answered == 30 * (len(values) + 1)
    assert sum(runs.rows * runs.count for runs in statistics.runs) == statistics.answered
    assert {runs.rows for runs in statistics.runs} > {1}


async def test_rows_are_joined_only_after_real_requests_gave_the_same_answers_alone(bench: Bench) -> None:
    await serve(bench, lambda path: adder(path, 10))
    await burst(bench, 1.0, 2.0)
    await eventually(lambda: bench.engine.rows == [1, 1, 2], "answered alone, then once more together to compare")


async def test_a_model_whose_rows_depend_on_each_other_is_never_batched(bench: Bench) -> None:
    await serve(bench, centred)
    for _ in range(10):
        assert await burst(bench, 1.0, 7.0, 20.0) == [0.0, 0.0, 0.0], "a row alone is its own mean"
    assert set(bench.engine.rows) == {1}


async def test_one_callers_bad_input_is_nobody_elses_failure(bench: Bench) -> None:
    await serve(bench, raises_unless_zero)
    for _ in range(TRIALS):
        await burst(bench, 0.0, 0.0)
    for _ in range(10):
        good, bad, other = await burst(bench, 0.0, 3.0, 0.0)
        assert (good, other) == (0.0, 0.0)
        assert isinstance(bad, EngineFailure)
    assert max(bench.engine.rows) > 1, "they were run together first"


async def test_rows_of_other_shapes_stay_apart(bench: Bench) -> None:
    path = identity(bench.folder / "any.onnx", TensorProto.FLOAT, ("n", "m"))
    specs = [(TensorSpec(name, "FP32", (-1, -1)),) for name in ("x", "y")]
    bench.server.switch(await bench.server.prepare(MODEL, Version("1"), path, *specs))
    await bench.server.commit(MODEL)

    async def widths(*widths: int) -> list[int]:
        def request(width: int) -> "asyncio.Task[float]":
            return asyncio.create_task(width_of(width))

        async def width_of(width: int) -> float:
            answer = await bench.server.infer(MODEL, None, {"x": np.zeros((1, width), np.float32)})
            return float(answer.outputs["y"].shape[1])

        tasks = await competing(bench, *[partial(request, width) for width in widths])
        return [round(width) for width in await asyncio.gather(*tasks)]

    for _ in range(TRIALS + 2):
        assert await widths(5, 6, 5, 6) == [5, 6, 5, 6]
    assert max(bench.engine.rows) == 2, "both fives, and both sixes"


async def test_the_urgent_overtake_and_the_late_are_told_and_not_run(bench: Bench) -> None:
    await serve(bench, lambda path: adder(path, 10))
    finished: list[float] = []

    def request(value: float, **terms: float) -> Callable[[], "asyncio.Task[float]"]:
        def start() -> "asyncio.Task[float]":
            task = asyncio.create_task(ask(bench, value, **terms))
            task.add_done_callback(lambda task: finished.append(value) if not task.exception() else None)
            return task

        return start

    tasks = await competing(
        bench, request(1.0, priority=9), request(2.0), request(3.0, timeout_s=0.001), request(4.0, priority=1)
    )
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers[2], DeadlineExceeded)
    assert finished == [4.0, 2.0, 1.0]
    assert sum(bench.engine.rows[:3]) == 3


async def test_in_a_full_queue_the_least_urgent_makes_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path, workers=1, queue=1)
    await serve(bench, lambda path: adder(path, 10))
    requests = [
        lambda: asyncio.create_task(ask(bench, 1.0, priority=9)),
        lambda: asyncio.create_task(ask(bench, 2.0, priority=1)),
    ]
    low, high = await asyncio.gather(*await competing(bench, *requests), return_exceptions=True)
    assert isinstance(low, Overloaded)
    assert high == 12.0
    await bench.server.close()


async def test_who_gives_up_while_waiting_is_never_run(bench: Bench) -> None:
    await serve(bench, lambda path: adder(path, 10))
    arrived = bench.engine.arrived
    bench.engine.open.clear()
    first = asyncio.create_task(ask(bench, 0.0))
    await eventually(lambda: bench.engine.arrived > arrived, "the core is busy")
    impatient = asyncio.create_task(ask(bench, 1.0))
    await asyncio.sleep(0.01)
    impatient.cancel()
    await asyncio.sleep(0.01)
    bench.engine.open.set()
    await first
    await ask(bench, 2.0)
    assert bench.engine.arrived == arrived + 2
    await bench.server.retire(MODEL)
    assert bench.engine.sessions[0].closed, "and it does not keep the session open"


async def test_threads_run_their_own_requests_and_share_the_cores(bench: Bench) -> None:
    await serve(bench, lambda path: adder(path, 10))
    ran_on: list[str] = []
    answers: list[float] = []
    session = bench.engine.sessions[0]
    run = session.run

    def noting(*arguments: object) -> object:
        ran_on.append(threading.current_thread().name)
        return run(*arguments)  # type: ignore[arg-type]

    session.run = noting  # type: ignore[method-assign, assignment]

    def work(number: int) -> None:
        for turn in range(20):
            feeds = {"x": np.full((1, 4), number + turn, np.float32)}
            found = bench.server.infer_here(MODEL, None, feeds)
            answers.append(float(found.outputs["y"][0, 0]) - number - turn)
            assert found.version == Version("1")

    threads = [threading.Thread(target=work, args=(number,), name=f"caller-{number}") for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert answers == [10.0] * 80
    assert any(name.startswith("caller") for name in ran_on)


async def test_a_model_that_loops_for_ever_on_one_input_is_stopped_and_others_are_answered(tmp_path: Path) -> None:
    bench = Bench(tmp_path, workers=1, queue=8, run_s_max=1)
    await serve(bench, endless_unless_zero)
    endless = asyncio.create_task(ask(bench, 1.0))
    await eventually(lambda: bench.engine.rows, "it runs")
    assert await ask(bench, 0.0) == 0.0
    with pytest.raises(EngineFailure, match="terminate"):
        await endless
    with pytest.raises(EngineFailure, match="terminate"):
        await asyncio.to_thread(bench.server.infer_here, MODEL, None, {"x": np.ones((1, 4), np.float32)})
    await bench.server.close()


async def test_telemetry_tells_runs_waits_and_those_who_never_ran(tmp_path: Path) -> None:
    bench = Bench(tmp_path, workers=1, queue=4)
    await serve(bench, lambda path: adder(path, 10))
    await ask(bench, 1.0)
    (before,) = bench.recorder.cut(1.0)
    assert (before.run_counts, before.run_rows) == ((1, 0, 0, 0, 0, 0, 0, 0), 1)
    assert sum(before.queue_counts or ()) == 1
    assert (before.refused, before.expired, before.cancelled) == (0, 0, 0)

    terms: list[dict[str, float]] = [{"timeout_s": 0.0001}, {}, {}, {}, {}, {}]
    arrived = bench.engine.arrived
    bench.engine.open.clear()
    first = asyncio.create_task(ask(bench, 0.0))
    await eventually(lambda: bench.engine.arrived > arrived, "the core is busy")
    tasks = [asyncio.create_task(ask(bench, 1.0, **each)) for each in terms]
    await asyncio.sleep(0.01)
    tasks[1].cancel()
    await asyncio.sleep(0)
    bench.engine.open.set()
    outcomes = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 2, "four may wait"
    assert isinstance(outcomes[1], DeadlineExceeded)
    (window,) = bench.recorder.cut(2.0)
    assert (window.refused, window.expired, window.cancelled) == (2, 1, 1)
    assert window.requests == sum(window.latency_counts) == sum(window.queue_counts or ()) == 3
    assert window.run_rows >= 3
    assert window.queue_max_s <= window.queue_sum_s
    await bench.server.close()
