"""A real agent, killed with SIGKILL at random moments of its life while it updates and while somebody asks it.

A controller rolls release after release out to it; version n adds n to what it is asked. The moments are drawn from a
seed: any time from the start of the process to a while after it answers. After each kill its disk is looked at, and
what the agent does then is seen from outside, by its answers.
"""

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import httpx

from common.errors import FerryError
from controller.rollouts.model import TERMINAL_ROLLOUT_STATES
from edge_agent.update import Installed
from tests.crash.invariants import is_complete
from tests.crash.survey import Memory, read_journal, tree_of
from tests.e2e.world import MODEL, World, until
from tests.integration.small_models import weighted

DEVICE = "victim"
TENSORS = 60
"""Makes a release of 4 MB."""
DOWNLOAD_BYTES_PER_S = 4_000_000
ANSWER_WITHIN_S = 90.0
ASK_EACH_S = 0.05
KILLS_PER_ROLLOUT = 4
LIFE_S = 2.5
"""A process lives up to this long after it answers."""


class Outcome(NamedTuple):
    """What came of it: `starts` are kills before the agent answered, `answers` all that it gave."""

    kills: int
    starts: int
    answers: int
    rollouts: int
    broken: tuple[str, ...]


class Asking:
    """Somebody who keeps asking, whether anybody is there or not; the context ends it."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v2/models/{MODEL}/infer"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answers: list[tuple[str, float]] = []
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0.0] * 4}
        with httpx.Client(timeout=30) as http:
            while not self._stopped.wait(ASK_EACH_S):
                try:
                    response = http.post(self._url, json={"inputs": [tensor]})
                except httpx.TransportError:
                    continue  # nobody there, or killed in the middle
                if response.status_code == 200:
                    body = response.json()
                    self.answers.append((body["model_version"], body["outputs"][0]["data"][0]))
                else:
                    self.errors.append(f"{response.status_code}: {response.text[:200]}")


class Victim:
    """The agent's process, on a port that stays the same."""

    def __init__(self, data: Path, log: Path) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self._port = unused.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._data = data
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "edge_agent", "run", "--data", str(self._data)]
        command += ["--inference-listen", f"127.0.0.1:{self._port}"]
        command += ["--download-rate-bytes-per-s", str(DOWNLOAD_BYTES_PER_S)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and self._process.poll() is not None


class Chase:
    """One device and the controller that updates it."""

    def __init__(self, world: World, folder: Path, seed: int) -> None:
        self._world = world
        self._chance = random.Random(seed)
        self._data = world.folder / DEVICE
        self._files = folder
        self._version = 1
        self._rollout = ""
        self._broken: list[str] = []
        self._generation = 0
        self._starts = 0
        folder.mkdir(exist_ok=True)

    def run(self, kills: int) -> Outcome:
        """Install the first release in peace, kill, and see that the last rollout succeeds in peace."""
        self._world.add_device(DEVICE)
        self._world.roll_out("1", self._release(1))
        self._world.agents[DEVICE].stop()
        victim = Victim(self._data, self._world.folder / "victim.log")
        with Asking(victim.url) as asking:
            for number in range(kills):
                if number % KILLS_PER_ROLLOUT == 0:
                    self._order_next()
                self._live_and_die(victim, asking)
            victim.start()
            try:
                self._end_in_peace()
            finally:
                victim.kill()
        self._broken += [f"a request was refused: {error}" for error in asking.errors]
        wrong = {answer for answer in asking.answers if float(answer[0]) != answer[1]}
        self._broken += [f"an answer said it was from {said} and was from {was}" for said, was in wrong]
        return Outcome(kills, self._starts, len(asking.answers), self._version, tuple(self._broken))

    def _live_and_die(self, victim: Victim, asking: Asking) -> None:
        before = read_journal(self._data)
        seen = len(asking.answers)
        started = time.monotonic()
        victim.start()
        if self._chance.random() < 0.5:  # perhaps before it answers
            self._sleep(self._chance.uniform(0.0, LIFE_S), victim)
        else:
            while len(asking.answers) == seen and time.monotonic() < started + ANSWER_WITHIN_S and not victim.ended:
                time.sleep(ASK_EACH_S)
            if len(asking.answers) == seen:
                self._broken.append(f"nothing answered {ANSWER_WITHIN_S:.0f} s after a restart")
            self._sleep(self._chance.uniform(0.0, LIFE_S), victim)
        victim.kill()
        answers = asking.answers[seen:]
        self._starts += not answers
        self._check(before, read_journal(self._data), {version for version, _ in answers})

    def _sleep(self, seconds: float, victim: Victim) -> None:
        time.sleep(seconds)
        if victim.ended:
            self._broken.append("the agent ended by itself")

    def _check(self, before: Memory, after: Memory, answered: set[str]) -> None:
        """What the disk says after the kill, and who answered between two kills."""
        named = {str(release.version) for memory in (before, after) for release in _releases(memory)}
        targets = {str(m.state.target.version) for m in (before, after) if m.state and m.state.target}
        if strange := answered - named - targets:
            self._broken.append(f"{strange} answered, neither old nor new")
        tree = tree_of(self._data)
        for release in _releases(after):
            if after.state and not is_complete(tree, after.state.model, release):
                self._broken.append(f"the journal names {release.version}, which is not complete")
        if after.state is None or after.state.installed is None:
            self._broken.append("there is no installed release any more")
        if after.generation < self._generation:
            self._broken.append(f"the generation went from {self._generation} to {after.generation}")
        self._generation = after.generation

    def _order_next(self) -> None:
        """The next release, whatever has become of the one before."""
        self._version += 1
        release = self._world.publish(str(self._version), self._release(self._version))
        self._abort()
        self._rollout = self._world.begin(release)

    def _abort(self) -> None:
        if not self._rollout:
            return
        with contextlib.suppress(FerryError):  # it may have ended, and a device that is dead cannot roll back
            self._world.client.act(self._rollout, "abort")
        until(self._is_over, "the rollout before is over", self._world)

    def _is_over(self) -> bool:
        return self._world.client.rollout(self._rollout).state in TERMINAL_ROLLOUT_STATES

    def _end_in_peace(self) -> None:
        self._order_next()
        self._world.finish(self._rollout)
        until(lambda: self._world.running(DEVICE) == str(self._version), "the last release runs", self._world)

    def _release(self, version: int) -> Path:
        folder = self._files / str(version)
        weighted(folder, 0, version, TENSORS)
        return folder / "model.onnx"


def _releases(memory: Memory) -> tuple[Installed, ...]:
    state = memory.state
    return tuple(release for release in (state.installed, state.candidate) if release) if state else ()
