"""The operator's command line against a real API: what it prints, where, and how it ends."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from common.errors import Conflict, InvalidInput, NotFound, Unavailable
from common.ids import ReleaseRef
from common.wire import JoinString
from controller.cli import cli
from controller.cli.output import size
from controller.cli.watching import views
from controller.client import FerryClient
from controller.resources import CreateJoinToken
from controller.rollouts.model import RolloutSpec
from controller.store.port import Event
from tests.integration.api_peer import ApiPeer, serving_in_thread, tiny_model
from tests.small_models import save_with_data

Ferry = Callable[..., Result]


class Fleet:
    """A running API that synchronous tests can reach."""

    def __init__(self, api: ApiPeer, loop: asyncio.AbstractEventLoop) -> None:
        self.api = api
        self._loop = loop

    def do(self, work: Any) -> Any:
        """Run a coroutine of the peer's on its own loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with serving_in_thread(tmp_path_factory.mktemp("api")) as (api, loop):
        fleet = Fleet(api, loop)
        for number in range(3):
            fleet.do(api.join(f"cam-{number}", site="oslo" if number else "bergen"))
        fleet.do(api.publish("detector", "1.0.0", tiny_model(1)))
        fleet.do(api.publish("detector", "1.1.0", tiny_model(2)))
        yield fleet


@pytest.fixture
def ferry(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ferry:
    """Runs `ferry` with these words, as the operator of `fleet`."""
    monkeypatch.setenv("FERRY_CONTEXTS", str(tmp_path / "contexts.json"))
    monkeypatch.setenv("FERRY_URL", fleet.api.url)
    monkeypatch.setenv("FERRY_TOKEN", fleet.api.token)
    runner = CliRunner()
    return lambda *words: runner.invoke(cli, [str(word) for word in words])


def model_file(folder: Path, number: int, name: str = "model.onnx") -> Path:
    file = folder / name
    file.write_bytes(tiny_model(number))
    return file


def test_publishing_says_what_happened_and_again_is_no_error(ferry: Ferry, tmp_path: Path) -> None:
    file = model_file(tmp_path, 5)
    first = ferry("release", "publish", "segmenter@1.0.0", file, "--variant", f"int8={file}")
    again = ferry("release", "publish", "segmenter@1.0.0", file, "--variant", f"int8={file}")
    assert (first.exit_code, again.exit_code) == (0, 0)
    assert "segmenter@1.0.0 is published" in first.stderr
    assert "same bytes" in again.stderr
    assert "default,int8" in first.stdout


def test_the_files_beside_a_model_that_it_keeps_weights_in_are_published_with_it(ferry: Ferry, tmp_path: Path) -> None:
    weights = np.ones(50_000, np.float32)
    model, data = save_with_data(tmp_path / "m", weights)
    published = ferry("release", "publish", "translator@1", model, "-o", "json")
    assert published.exit_code == 0, published.stderr
    variant = json.loads(published.stdout)["manifest"]["variants"]["default"]
    assert (variant["model"], sorted(variant["files"])) == ("model.onnx", ["model.onnx", "model.onnx.data"])
    assert variant["files"]["model.onnx.data"]["size"] == data.stat().st_size
    shown = ferry("release", "show", "translator@1").stdout
    assert size(model.stat().st_size + data.stat().st_size) in shown
    assert "model.onnx.data" in shown
    other, _ = save_with_data(tmp_path / "n", 2 * weights)
    assert ferry("release", "publish", "translator@2", other).exit_code == 0
    lines = ferry("release", "diff", "translator@1", "translator@2").stdout.splitlines()
    assert [line.split()[1] for line in lines[1:3]] == ["model.onnx", "model.onnx.data"]
    assert ["identical" in line for line in lines[1:3]] == [True, False]


def test_a_model_without_its_data_is_refused_before_anything_is_sent(ferry: Ferry, tmp_path: Path) -> None:
    model, data = save_with_data(tmp_path / "m", np.ones(10, np.float32))
    data.unlink()
    refused = ferry("release", "publish", "translator@3", model)
    assert refused.exit_code == 2
    assert "'model.onnx.data' are not beside the model" in refused.stderr
    assert "fix: copy model.onnx.data into" in refused.stderr


def test_publishing_other_bytes_under_the_same_version_ends_with_4(ferry: Ferry, tmp_path: Path) -> None:
    result = ferry("release", "publish", "detector@1.0.0", model_file(tmp_path, 6))
    assert result.exit_code == 4
    assert "error: version: " in result.stderr
    assert "fix: " in result.stderr


def test_publishing_what_is_not_a_model_ends_with_2(ferry: Ferry, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a model")
    result = ferry("release", "publish", "notes@1", file)
    assert result.exit_code == 2
    assert "variants.default" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("release", "show", "detector@9"), 3, "there is no release detector@9"),
        (("release", "show", "detector"), 2, "no '@'"),
        (("release", "publish", "x@1"), 2, "there is no file"),
        (("device", "show", "nobody"), 3, "there is no device nobody"),
        (("device", "list", "--selector", "labels.site = 1"), 2, "selector: "),
        (("device", "label", "cam-0", "what"), 2, "KEY=VALUE"),
        (("rollout", "show", "r-none"), 3, "there is no rollout"),
        (("rollout", "create", "detector@1.0.0", "--phases", "50%,20%"), 2, "phases[1].percent"),
        (("rollout", "create", "detector@1.0.0", "--phases", "half"), 2, "phases[0]"),
        (("rollout", "create", "detector@1.0.0", "--selector", "false"), 2, "matches no device"),
        (("rollout", "create", "detector@9"), 3, "does not exist"),
        (("rollout", "create"), 2, "release: is missing"),
        (("rollout", "create", "detector@1.0.0", "--bake", "soon"), 2, "not a duration"),
        (("device", "token", "create", "--uses", "0"), 2, "uses"),
        (("context", "use", "nowhere"), 3, "there is no context"),
        (("--context", "nowhere", "health"), 3, "there is no context"),
        (("--url", "nonsense", "health"), 2, "is not a URL"),
        (("health", "--token-file", "/nonexistent"), 2, "token-file"),
        (("nonsense",), 2, "No such command"),
    ],
)
def test_a_refusal_names_the_cause_on_stderr_and_sets_the_exit_code(
    ferry: Ferry, words: tuple[str, ...], code: int, text: str
) -> None:
    result = ferry(*words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert text in result.stderr


def test_a_controller_that_is_away_ends_with_5_and_names_the_url(ferry: Ferry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.client.ATTEMPTS_MAX", 1)
    result = ferry("--url", "http://127.0.0.1:1", "device", "list")
    assert result.exit_code == 5
    assert "http://127.0.0.1:1" in result.stderr
    assert "is the controller running" in result.stderr


def test_a_wrong_token_ends_with_1(ferry: Ferry) -> None:
    result = ferry("device", "list", "--token", "ferrya_wrong")
    assert (result.exit_code, result.stdout) == (1, "")


def test_each_output_form_shows_the_same_devices(ferry: Ferry) -> None:
    names = ["cam-0", "cam-1", "cam-2"]
    as_table = ferry("device", "list").stdout.splitlines()
    as_json = json.loads(ferry("device", "list", "-o", "json").stdout)
    as_yaml = yaml.safe_load(ferry("-o", "yaml", "device", "list").stdout)
    as_names = ferry("device", "list", "-o", "name").stdout.split()
    assert [line.split()[0] for line in as_table] == ["DEVICE", *names]
    assert as_names == [device["id"] for device in as_json] == names
    assert as_yaml == as_json


def test_devices_are_selected_shown_and_labelled(ferry: Ferry) -> None:
    bergen = ferry("device", "list", "--selector", 'labels.site == "bergen"', "-o", "name").stdout.split()
    labelled = ferry("device", "label", "cam-2", "ring=canary", "site-", "-o", "json")
    shown = ferry("device", "show", "cam-2").stdout
    assert bergen == ["cam-0"]
    assert json.loads(labelled.stdout)["labels"] == {"ring": "canary"}
    assert "ring=canary" in shown
    assert "never_seen" in shown


def test_a_join_string_is_the_only_line_on_stdout(ferry: Ferry) -> None:
    made = ferry("device", "token", "create", "--uses", "2", "--ttl", "1h", "--label", "site=oslo")
    listed = json.loads(ferry("device", "token", "list", "-o", "json").stdout)
    claim = next(token for token in listed if token["uses_left"] == 2)
    withdrawn = ferry("device", "token", "withdraw", claim["id"])
    assert JoinString.parse(made.stdout.strip()).token.startswith("ferryj_")
    assert (claim["labels"], withdrawn.exit_code) == ({"site": "oslo"}, 0)
    assert claim["id"] not in ferry("device", "token", "list", "-o", "name").stdout


def test_two_releases_are_compared_by_file_and_tensor(ferry: Ferry) -> None:
    as_text = ferry("release", "diff", "detector@1.0.0", "detector@1.1.0").stdout
    (variant,) = json.loads(ferry("release", "diff", "detector@1.0.0", "detector@1.1.0", "-o", "json").stdout)[
        "variants"
    ]
    same = ferry("release", "diff", "detector@1.0.0", "detector@1.0.0").stdout
    assert "changed" in as_text
    assert "inputs and outputs are the same" in as_text
    (file,) = variant["files"]
    assert file["old"]["digest"] != file["new"]["digest"]
    assert "identical" in same


def test_a_plan_shows_devices_and_bytes_and_changes_nothing(ferry: Ferry) -> None:
    planned = ferry("rollout", "plan", "detector@1.0.0", "--phases", "1,100%")
    preview = json.loads(ferry("rollout", "plan", "detector@1.0.0", "--phases", "1,100%", "-o", "json").stdout)
    assert planned.exit_code == 0
    assert planned.stdout.splitlines()[-1].startswith("all")
    assert [phase["devices"] for phase in preview["phases"]] == [1, 2]
    assert ferry("rollout", "list", "-o", "name").stdout == ""


def test_a_rollout_is_created_steered_and_watched_to_its_end(ferry: Ferry, fleet: Fleet) -> None:
    options = ("--phases", "1,100%", "--bake", "10m", "--max-failures", "1", "--on-failure", "pause", "--approve-each")
    created = json.loads(ferry("rollout", "create", "detector@1.0.0", *options, "-o", "json").stdout)
    rollout = created["id"]
    budget = created["spec"]["error_budget"]
    assert (created["spec"]["bake_s"], budget["count"], created["spec"]["on_failure"]) == (600, 1, "pause")
    assert [phase["approval"] for phase in created["spec"]["phases"]] == [False, True]
    assert "paused" in ferry("rollout", "pause", rollout).stdout
    assert ferry("rollout", "show", rollout, "--devices", "-o", "name").stdout.split() == ["cam-0", "cam-1", "cam-2"]

    # Somebody else ends it while it is watched: the event, or the poll, tells the watcher.
    other = threading.Timer(0.3, lambda: FerryClient(fleet.api.url, fleet.api.token).act(rollout, "abort"))
    other.start()
    watched = ferry("rollout", "watch", rollout)
    other.join()
    assert watched.exit_code == 1
    assert "paused" in watched.stdout.splitlines()[0]
    assert "aborted" in watched.stdout.splitlines()[-1]
    assert ferry("rollout", "resume", rollout).exit_code == 4


def test_a_byte_budget_is_planned_with_and_kept_in_the_rollout(ferry: Ferry) -> None:
    options = ("detector@1.0.0", "--max-bytes", "0.1kB", "--on-exceed", "fail", "-o", "json")
    preview = json.loads(ferry("rollout", "plan", *options).stdout)
    assert [phase["over_budget"] for phase in preview["phases"]] == [preview["devices"]]
    assert "OVER BUDGET" in ferry("rollout", "plan", "detector@1.0.0").stdout
    spec = json.loads(ferry("rollout", "create", *options).stdout)["spec"]
    assert (spec["max_bytes"], spec["on_exceed"]) == (100, "fail")
    alone = ferry("rollout", "plan", "detector@1.0.0", "--on-exceed", "fail")
    assert (alone.exit_code, "--max-bytes" in alone.stderr) == (2, True)


def test_terms_for_live_requests_are_kept_in_the_rollout_and_shown(ferry: Ferry, tmp_path: Path) -> None:
    shadow = ("--shadow", "10m", "--shadow-share", "10%", "--shadow-agreement", "0.98", "--shadow-agree", "top1")
    split = ("--split", "0.25", "--split-header", "X-Side", "--split-key", "X-Caller")
    few = ("--shadow-samples", "50", "--shadow-on-few", "fail")
    made = json.loads(ferry("rollout", "create", "detector@1.0.0", *shadow, *few, *split, "-o", "json").stdout)
    terms = made["spec"]["shadow"]
    assert (terms["for_s"], terms["share"], terms["agreement_min"], terms["agree"]) == (600, 0.1, 0.98, "top1")
    assert (terms["samples_min"], terms["on_few"]) == (50, "fail")
    assert made["spec"]["split"] == {"share": 0.25, "header": "X-Side", "key": "X-Caller"}
    shown = ferry("rollout", "show", made["id"]).stdout
    assert "600 s, 10.0% of the requests (top1, 98.0% must agree; with fewer than 50: fail)" in shown
    assert "25.0% of the requests (header X-Side, key X-Caller)" in shown
    plain = json.loads(ferry("rollout", "create", "detector@1.0.0", "-o", "json").stdout)
    assert (plain["spec"]["shadow"], plain["spec"]["split"]) == (None, None)
    assert "SHADOW" not in ferry("rollout", "show", plain["id"]).stdout
    file = tmp_path / "rollout.yaml"
    file.write_text("release: detector@1.0.0\nshadow: {for_s: 60, atol: 0.5}\n")
    made = json.loads(ferry("rollout", "create", "-f", file, "--shadow-share", "0.5", "-o", "json").stdout)
    assert [made["spec"]["shadow"][name] for name in ("for_s", "atol", "share")] == [60, 0.5, 0.5]
    ferry("rollout", "abort", made["id"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shadow-agreement", "0.9"), ["needs --shadow", "fix: say for how long"]),
        (("--split-header", "X-Side"), ["needs --split", "fix: say how many"]),
        (("--shadow", "0"), ["shadow", "for_s"]),
        (("--shadow", "2d"), ["shadow", "for_s"]),
        (("--shadow", "1m", "--shadow-share", "0"), ["shadow", "share"]),
        (("--shadow", "1m", "--shadow-samples", "0"), ["samples_min"]),
        (("--split", "0"), ["lets nobody reach the candidate"]),
        (("--split", "50%", "--split-header", "X Side"), ["header"]),
        (("--split", "150%"), ["is not a share"]),
    ],
)
def test_terms_for_live_requests_that_cannot_be_are_refused_before_anything_is_sent(
    ferry: Ferry, options: tuple[str, ...], words: list[str]
) -> None:
    refused = ferry("rollout", "create", "detector@1.0.0", *options)
    assert refused.exit_code == 2
    for word in words:
        assert word in refused.stderr


def test_the_commands_of_the_how_to_page_do_what_it_says(ferry: Ferry, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/shadow-and-ab.md").read_text()
    commands = re.findall(r"^ferry (rollout create .*)$", page, re.MULTILINE)
    made = [json.loads(ferry(*command.split(), "-o", "json").stdout)["spec"] for command in commands]
    assert [(bool(spec["shadow"]), bool(spec["split"])) for spec in made] == [(True, False), (False, True)]
    assert (made[0]["shadow"]["for_s"], made[0]["shadow"]["agreement_min"]) == (600, 0.98)
    assert (made[1]["probation_s"], made[1]["split"]["share"]) == (86_400, 0.1)
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "rollout.yaml"
    file.write_text(text)
    spec = json.loads(ferry("rollout", "create", "-f", file, "-o", "json").stdout)["spec"]
    assert (spec["shadow"]["share"], spec["shadow"]["rtol"]) == (0.1, 0.05)
    assert ferry("release", "stats", "detector@1.1.0").exit_code == 0
    assert ferry("device", "show", "cam-1").exit_code == 0


def test_the_api_refuses_terms_that_it_does_not_know(fleet: Fleet) -> None:
    release = {"model": "detector", "version": "1.0.0"}
    for terms, word in (
        ({"shadow": {"for_s": 10, "agrement_min": 0.9}}, "agrement_min"),
        ({"split": {"share": 0}}, "split"),
    ):
        reply = fleet.do(fleet.api.ask("POST", "/v1/rollouts", json={"release": release, **terms}))
        assert reply.status in {400, 422}
        assert word in json.dumps(reply.problem())


def test_a_rollout_is_followed_also_where_no_event_stream_gets_through(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(FerryClient):
        def signals(self, *, kind: str = "", subject: str = "", after: int | None = None) -> Iterator[Event | None]:
            raise Unavailable("the proxy swallows streams")

    monkeypatch.setattr("controller.cli.watching.POLL_S", 0.1)
    with FerryClient(fleet.api.url, fleet.api.token) as client, Deaf(fleet.api.url, fleet.api.token) as deaf:
        rollout = client.create_rollout(RolloutSpec(release=ReleaseRef.parse("detector@1.0.0"))).id
        seen = []
        for view in views(deaf, rollout):
            seen.append(view.state.value)
            if len(seen) == 1:
                client.act(rollout, "abort")
    assert (seen[0], seen[-1]) == ("preparing", "aborted")


def test_a_rollout_spec_can_come_from_a_file(ferry: Ferry, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text('release: detector@1.0.0\nphases:\n  - selector: id == "cam-1"\n  - percent: 100\nbake_s: 5\n')
    preview = json.loads(ferry("rollout", "plan", "-f", file, "-o", "json").stdout)
    file.write_text("release: detector@1.0.0\nphasez: []\n")
    misspelt = ferry("rollout", "plan", "-f", file)
    assert [phase["devices"] for phase in preview["phases"]] == [1, 2]
    assert misspelt.exit_code == 2
    assert "phasez" in misspelt.stderr


def test_events_and_audit_are_shown(ferry: Ferry) -> None:
    events = ferry("event", "watch", "--after", "0", "--kind", "device.joined", "--count", "3", "-o", "json").stdout
    audit = json.loads(ferry("audit", "list", "--limit", "1000", "-o", "json").stdout)
    assert [json.loads(line)["subject"] for line in events.splitlines()] == ["cam-0", "cam-1", "cam-2"]
    assert {"device.join", "release.publish"} <= {entry["action"] for entry in audit}


def test_contexts_are_remembered_in_a_private_file(
    ferry: Ferry, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FERRY_URL")
    monkeypatch.delenv("FERRY_TOKEN")
    secret = tmp_path / "token"
    secret.write_text(fleet.api.token + "\n")
    assert ferry("context", "set", "lab", "--url", fleet.api.url, "--token-file", secret).exit_code == 0
    assert ferry("context", "set", "away", "--url", "http://127.0.0.1:1", "--token", "hush").exit_code == 0
    listed = ferry("context", "list").stdout
    assert ferry("health").exit_code == 0
    assert ferry("--context", "lab", "device", "list").exit_code == 0
    assert ferry("context", "use", "away").exit_code == 0
    assert ferry("device", "list", "--context", "lab").exit_code == 0
    assert "hush" not in listed
    assert (tmp_path / "contexts.json").stat().st_mode & 0o777 == 0o600


def test_help_starts_without_the_heavy_libraries() -> None:
    """Start-up time is what people feel; no command needs the server's libraries at all."""
    program = (
        "import sys, click.testing, controller.cli as c\n"
        "click.testing.CliRunner().invoke(c.cli, ['--help'])\n"
        "print(sorted({'httpx', 'rich', 'msgspec', 'yaml'} & set(sys.modules)))\n"
        "from controller.cli import release, device, rollout, event, context, connection, watching, comparison\n"
        "import controller.client\n"
        "print(sorted({'sqlalchemy', 'aiohttp', 'onnxruntime', 'cel'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.splitlines() == ["[]", "[]"]


def test_the_client_raises_the_servers_errors(fleet: Fleet, tmp_path: Path) -> None:
    with FerryClient(fleet.api.url, fleet.api.token) as client:
        with pytest.raises(NotFound, match="there is no device"):
            client.device("nobody")
        with pytest.raises(Conflict) as conflict:
            client.publish("detector", "1.0.0", {"default": model_file(tmp_path, 8)})
        with pytest.raises(InvalidInput, match="cannot read"):
            client.publish("detector", "2.0.0", {"default": tmp_path / "missing.onnx"})
        with pytest.raises(InvalidInput) as selector:
            list(client.devices("labels.site =="))
    assert (conflict.value.field, selector.value.field) == ("version", "selector")
    assert conflict.value.fix


def test_the_client_tells_its_progress_and_uploads_nothing_twice(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "big.bin"
    file.write_bytes(os.urandom(700_000))
    steps: list[tuple[int, int]] = []
    with FerryClient(fleet.api.url, fleet.api.token) as client:
        first = client.upload(file, lambda done, total: steps.append((done, total)))
        count = len(steps)
        again = client.upload(file, lambda done, total: steps.append((done, total)))
    assert first == again
    assert (steps[-1], count, len(steps)) == ((700_000, 700_000), 3, 3)


def test_one_client_is_one_trace(fleet: Fleet) -> None:
    with FerryClient(fleet.api.url, fleet.api.token) as client:
        spec = RolloutSpec(release=ReleaseRef.parse("detector@1.1.0"))
        rollout = client.create_rollout(spec)
        client.act(rollout.id, "abort", revision=rollout.revision)
        assert rollout.traceparent is not None
        assert rollout.traceparent.split("-")[1] == client.trace_id


def test_a_mutation_whose_answer_is_lost_is_done_once(fleet: Fleet) -> None:
    """The first connection is cut after the request got through; the client's own repeat finds the stored answer."""
    with FerryClient(fleet.api.url, fleet.api.token) as client:
        before = len(list(client.join_tokens()))
        with _losing_first_answer(fleet.api.url) as url, FerryClient(url, fleet.api.token) as unlucky:
            made = unlucky.create_join_token(CreateJoinToken(uses=7))
        after = list(client.join_tokens())
    assert len(after) == before + 1
    assert made.id in {token.id for token in after}


def test_an_event_stream_that_breaks_is_unavailable(fleet: Fleet) -> None:
    with (
        _losing_first_answer(fleet.api.url) as url,
        FerryClient(url, fleet.api.token) as client,
        pytest.raises(Unavailable),
    ):
        next(client.events())


@contextlib.contextmanager
def _losing_first_answer(url: str) -> Iterator[str]:
    """A proxy on a free port that passes every request on, and cuts its first connection instead of answering."""
    upstream = urlsplit(url)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):  # the server socket is closed at the end
                for number in itertools.count():
                    client, _ = server.accept()
                    with client, socket.create_connection((upstream.hostname, upstream.port)) as behind:
                        _pass_on(client, behind, answer=number > 0)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def _pass_on(client: socket.socket, behind: socket.socket, *, answer: bool) -> None:
    """One request through, and its answer back or not. Small requests: each fits one read after its head."""
    behind.sendall(client.recv(65_536))
    client.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        behind.sendall(client.recv(65_536))
    head = behind.recv(65_536)
    if answer:
        client.sendall(head)
