"""The parts of the serving benchmark that decide: what is sent, what counts as an answer, medians, goals, the page."""

import base64
from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks.agent import goals, load, page
from benchmarks.agent.batching import Batched
from benchmarks.agent.figures import RAW_ALL, RAW_ONE, Turn, Turns
from benchmarks.agent.library import Waits
from benchmarks.agent.load import Load
from benchmarks.agent.models import BenchModel
from benchmarks.agent.servers import KINDS, OURS, Server
from benchmarks.agent.swaps import Swapping, Traffic
from common.artifact import TensorSpec
from common.artifact.tensors import Array
from edge_agent.inference.http import HEADER_LENGTH
from edge_agent.inference.protocol import decode_request
from tests.integration.small_models import adder

SMALL, LARGE = "silero-vad", "magika"


def bench_model(path: Path, *, rows: bool = True) -> BenchModel:
    feeds: dict[str, Array] = {"x": np.arange(4, dtype=np.float32).reshape(1, 4), "n": np.array([7], np.int64)}
    return BenchModel("small", "a model", path, feeds, rows=rows)


@pytest.mark.parametrize("form", ["v2_binary", "v2_json"])
def test_what_we_and_mlserver_are_sent_means_the_inputs_of_the_model(tmp_path: Path, form: str) -> None:
    model = bench_model(tmp_path)
    body = getattr(model, form)()
    length = body.headers.get(HEADER_LENGTH)
    request = decode_request(body.data, int(length) if length else None)
    assert request.feeds.keys() == model.feeds.keys()
    assert all(np.array_equal(request.feeds[name], array) for name, array in model.feeds.items())


def test_servers_without_a_protocol_are_sent_the_same_bytes(tmp_path: Path) -> None:
    model = bench_model(tmp_path)
    assert model.bare().data == np.arange(4, dtype="<f4").tobytes() + np.array([7], "<i8").tobytes()
    document = msgspec.json.decode(model.base64_json().data)
    assert base64.b64decode(document["data"]) == model.bare().data


def test_rows_are_declared_open_only_where_they_may_share_a_batch(tmp_path: Path) -> None:
    assert bench_model(tmp_path).declared[0] == TensorSpec("x", "FP32", (-1, 4))
    assert bench_model(tmp_path, rows=False).declared[0] == TensorSpec("x", "FP32", (1, 4))


def test_failures_are_no_answers() -> None:
    printed = 'Running\nRESULT {"answered": 100, "seconds": 2.0, "failed": 40, "p50_ms": 1.5, "p99_ms": 9.0}\n'
    assert load.parse(printed) == Load(100, 2.0, 40, 1.5, 9.0)
    assert load.parse(printed).per_second == 30


@pytest.mark.skipif(not load.installed(), reason="wrk is not installed")
def test_a_server_is_asked_only_in_its_turn_and_failures_are_seen(tmp_path: Path) -> None:
    feeds = {"x": np.ones((1, 4), np.float32)}
    model = BenchModel("small", "a model", adder(tmp_path / "model.onnx", 1), feeds)
    with Server(KINDS[0], model, tmp_path / "log") as server:
        server.wait_ready()
        before = server.cpu_s()
        with server.turn():
            good = load.offer(server.url, server.body, clients=2, seconds=1)
            bad = load.offer(server.url.replace("model/infer", "other/infer"), server.body, clients=2, seconds=1)
        spent = server.cpu_s()
        assert good.answered > 0
        assert good.failed == 0
        assert bad.failed == bad.answered > 0
        assert spent > before
        assert load.offer(server.url, server.body, clients=1, seconds=1).answered == 0, "it is stopped"


def turn(server: str, clients: int, answered: int, cpu_s: float, *, number: int = 0, model: str = SMALL) -> Turn:
    return Turn(number, model, server, clients, Load(answered, 1.0, 0, 1.0, 2.0), cpu_s)


def test_ratios_are_of_one_round_and_the_median_round_counts() -> None:
    turns = Turns(
        turn(server, 8, answered * speed, 1.0, number=number)
        for number, speed in enumerate((100, 1, 10))  # the machine was busy in the second round
        for server, answered in (("peer", 2), (OURS, 4 if number else 2))
    )
    ratio = turns.against(SMALL, (OURS, 8), ("peer", 8), lambda a, b: a.load.per_second / b.load.per_second)
    assert ratio == 2
    assert turns.middle(SMALL, OURS, 8, lambda one: one.load.per_second) == 40


def a_run(*, ours_cpu_s: float) -> Turns:
    return Turns(
        [
            turn(RAW_ONE, 0, 1000, 0.1),
            turn(OURS, 1, 1000, 0.1 + ours_cpu_s),
            turn(OURS, 8, 1000, ours_cpu_s),
            turn(OURS, 64, 900, 1.0),
            turn("slow", 8, 1000, 4.0),
            turn("fast", 8, 1000, 0.9),
            turn(RAW_ALL, 0, 100, 1.0, model=LARGE),
            turn(OURS, 8, 94, 1.0, model=LARGE),
        ]
    )


def test_goals_are_judged_against_raw_and_the_best_of_the_peers() -> None:
    rows = {row.what: row for row in goals.of_turns(a_run(ours_cpu_s=0.3), SMALL, [LARGE], ["slow", "fast"])}
    assert rows[f"{LARGE}, 8 clients: throughput over HTTP to raw on all cores"].met is False
    assert rows[f"{SMALL}, 64 clients: throughput over HTTP to raw on one thread"].met is True
    assert rows[f"{SMALL}, 1 client: CPU that HTTP adds"].measured == pytest.approx(0.3)
    assert rows[f"{SMALL}, 8 clients: CPU of the best peer (fast) to ours"].measured == pytest.approx(3)
    assert rows[f"{SMALL}, 8 clients: CPU of the best peer (fast) to ours"].met is True
    slower = {row.what: row.met for row in goals.of_turns(a_run(ours_cpu_s=0.4), SMALL, [LARGE], ["slow", "fast"])}
    assert slower[f"{SMALL}, 1 client: CPU that HTTP adds"] is False
    assert slower[f"{SMALL}, 8 clients: CPU of the best peer (fast) to ours"] is False


def test_learned_batches_must_reach_the_best_fixed_size_and_never_fall_below_single_rows() -> None:
    gaining, losing = Batched("gains", {1: 100, 4: 200}, 194), Batched("loses", {1: 100, 4: 90}, 94)
    met = {row.what: row.met for row in goals.of_batching([gaining, losing])}
    assert met == {
        "gains: learned batches to the best fixed (4)": True,
        "gains: learned batches to batch 1": True,
        "loses: learned batches to the best fixed (1)": False,
    }


def test_the_library_and_swaps_are_judged_by_ratios() -> None:
    assert [row.met for row in goals.of_library([Waits("a", 1.0, 1.09), Waits("b", 1.0, 1.2)])] == [True, False]
    idle, busy = Traffic([0.010] * 200, 200, 0), Traffic([0.010] * 190 + [0.015] * 10, 201, 1)
    assert [row.met for row in goals.of_swaps(Swapping(5, idle, busy))] == [False, False, None]


def test_the_page_shows_every_server_and_marks_the_best_fixed_batch() -> None:
    batched = [Batched(LARGE, {1: 100.0, 2: 150.0}, 140.0)]
    text = page.body(a_run(ours_cpu_s=0.3), [], batched, {SMALL: "voice activity", LARGE: "content type"})
    assert "## silero-vad: voice activity" in text
    assert f"| {RAW_ONE} |  | 1000 | 0.1 | 1 | 2 |" in text
    assert "| fast | 8 | 1000 | 0.9 | 1 | 2 |" in text
    assert f"| {LARGE} | 100 | **150** | 140 |" in text


def test_the_page_warns_of_what_spoils_the_figures() -> None:
    assert page.warnings(short=False, load=0.1, missing=[]) == ""
    spoilt = page.warnings(short=True, load=9.04, missing=["mlserver"])
    assert all(words in spoilt for words in ("A short run", "a load of 9.0", "not measured:** mlserver."))
