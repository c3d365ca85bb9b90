"""A small real fleet for tests: the three programs as processes on free ports, and the questions tests ask of it.

Everything is below one folder. `Fleet.stop` ends every process, also those that a test killed and started again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
import pytest

from common.artifact.manifest import DEFAULT_VARIANT
from common.ids import ReleaseRef
from controller.cli.demo import traffic
from controller.cli.demo.fleet import Endpoint, Program, stop_all
from controller.client import FerryClient
from controller.resources import CreateJoinToken, DeviceView, RolloutView
from controller.rollouts.model import PhaseSpec, RolloutSpec, RolloutState

T = TypeVar("T")

MODEL = "content-type"
WITHIN_S = 90.0
POLL_S = 0.05
AT_A_BRISK_PACE = {
    "FERRY_BROKER_LISTEN": "127.0.0.1:0",
    "FERRY_HEARTBEAT_S": "1",
    "FERRY_POLL_S": "1",
    "FERRY_RECONCILE_S": "0.2",
}


class World:
    """One controller and some agents. Devices are named by the caller."""

    def __init__(self, folder: Path, controller_environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.controller = Program(
            "controller",
            folder,
            ["controller", "serve", "--data", str(folder / "controller"), "--listen", "127.0.0.1:0"],
            AT_A_BRISK_PACE | (controller_environment or {}),
        )
        self.agents: dict[str, Program] = {}
        self.urls: dict[str, str] = {}
        self.endpoint: Endpoint
        self.client: FerryClient

    def start(self) -> None:
        """Start the controller."""
        ready = self.controller.start()
        token_file = Path(ready["admin_token_file"])
        self.endpoint = Endpoint(ready["url"], ready["broker_url"], token_file.read_text().strip(), token_file)
        self.client = FerryClient(self.endpoint.url, self.endpoint.token)

    def add_device(self, name: str, **environment: str) -> None:
        """Join and start an agent; `environment` are its settings, as `download_rate_bytes_per_s="1000"`."""
        join = self.client.create_join_token(CreateJoinToken()).join_string
        variables = {f"FERRY_AGENT_{key.upper()}": value for key, value in environment.items()}
        data = str(self.folder / name)
        command = [sys.executable, "-m", "edge_agent", "join", join, "--data", data, "--name", name]
        subprocess.run(command, check=True, capture_output=True)
        arguments = ["edge_agent", "run", "--data", data, "--inference-listen", "127.0.0.1:0"]
        self.agents[name] = Program(name, self.folder, arguments, variables)
        self.start_agent(name)

    def start_agent(self, name: str) -> None:
        """Start a stopped or killed agent again."""
        self.urls[name] = self.agents[name].start()["inference_url"]

    def kill_broker(self) -> None:
        """SIGKILL the embedded broker; the controller starts another."""
        pid = int((self.folder / "controller/broker/nats.pid").read_text())
        os.kill(pid, signal.SIGKILL)

    def publish(self, version: str, file: Path) -> ReleaseRef:
        """Publish `file` as that version of the model."""
        self.client.publish(MODEL, version, {DEFAULT_VARIANT: file})
        return ReleaseRef.parse(f"{MODEL}@{version}")

    def begin(self, release: ReleaseRef, *phases: PhaseSpec, probation_s: float = 0.5, bake_s: float = 0.2) -> str:
        """Create a rollout and return its id."""
        chosen = phases or (PhaseSpec(percent=100),)
        spec = RolloutSpec(release=release, phases=chosen, probation_s=probation_s, bake_s=bake_s, silence_s=60.0)
        return self.client.create_rollout(spec).id

    def finish(self, rollout: str, state: RolloutState = RolloutState.SUCCEEDED) -> RolloutView:
        """Wait until the rollout is in `state`."""
        return until(lambda: _if_in(self.client.rollout(rollout), state), f"rollout {rollout} is {state.value}", self)

    def roll_out(self, version: str, file: Path, *phases: PhaseSpec) -> RolloutView:
        """Publish, roll out to everybody, and wait until that has succeeded."""
        return self.finish(self.begin(self.publish(version, file), *phases))

    def running(self, device: str) -> str | None:
        """The version that answers on the device, as it reports."""
        reported = self.client.device(device).reported
        models = reported.models if reported else ()
        return next((entry.running for entry in models if entry.model == MODEL), None)

    def answer(self, device: str, content: bytes) -> traffic.Answer:
        """What the device's model says of a file's content."""
        with httpx.Client(timeout=30) as http:
            return traffic.infer(http, self.urls[device], traffic.request_body(content))

    def device(self, name: str) -> DeviceView:
        """The device as the API shows it."""
        return self.client.device(name)

    def stop(self) -> None:
        """End every process."""
        stop_all(self.agents.values())
        self.controller.stop()

    def logs(self) -> str:
        """The end of every program's log, for a failing test."""
        programs = (self.controller, *self.agents.values())
        return "\n\n".join(f"--- {one.name}\n{one.log.read_text()[-3000:]}" for one in programs if one.log.exists())


def until(condition: Callable[[], T | None], what: str, world: World | None = None, within_s: float = WITHIN_S) -> T:
    """The first true value of `condition()`; fails, with the logs, when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"did not happen within {within_s:.0f} s: {what}\n{world.logs() if world else ''}")
        time.sleep(POLL_S)
    return value


def _if_in(rollout: RolloutView, state: RolloutState) -> RolloutView | None:
    return rollout if rollout.state is state else None
