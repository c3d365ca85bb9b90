"""The demo's story, told on a real fleet through the public interfaces only.

Five devices join. v1 goes to all of them; from then on an application on each device never stops asking. v2 goes out in
phases, while one device with a slow link is killed in the middle of its download. v3 is fitted on what the fleet itself
answered. v4 is broken and must be taken back after one device. What each chapter promises is checked at the end.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgspec
import numpy as np

from common.artifact.manifest import DEFAULT_VARIANT
from common.errors import Unavailable
from common.ids import DeviceId, ReleaseRef
from controller.cli.demo import corpus, figures, models, traffic
from controller.cli.demo.corpus import LabelledFile
from controller.cli.demo.figures import Expectation, Figures, ReleaseFigures
from controller.cli.demo.fleet import Endpoint, Fleet
from controller.cli.demo.watch import UpdateWatch
from controller.client import FerryClient
from controller.resources import CreateJoinToken, DeviceView, RolloutView
from controller.rollouts.model import TERMINAL_ROLLOUT_STATES, PhaseSpec, RolloutSpec, RolloutState

DEVICES = tuple(DeviceId(f"device-{number}") for number in range(1, 6))
SLOW_DEVICE = DEVICES[4]
SLOW_BYTES_PER_S = 1_000_000
"""Slow enough to be killed in the middle of 3 MB, fast enough not to bore."""
KILL_AFTER_BYTES = 1_000_000

BAKE_S = 1.0
PROBATION_S = 2.0
SILENCE_S = 60.0
ROLLOUT_TIMEOUT_S = 180.0
CALM_S = 3.0
"""How long the application runs undisturbed, to know what idle looks like."""
POLL_S = 0.1
TINY_PERCENT = 2.0

Say = Callable[[str], None]


class Watcher(msgspec.Struct, frozen=True):
    """How the story talks to whoever watches: a new chapter, and what is going on in it."""

    chapter: Say
    progress: Say


class Story:
    """One telling. `run` returns what was measured; `close` ends the traffic (not the fleet)."""

    def __init__(self, fleet: Fleet, endpoint: Endpoint, model_folder: Path, watcher: Watcher) -> None:
        self.fleet = fleet
        self.watcher = watcher
        self.client = FerryClient(endpoint.url, endpoint.token)
        self.updates = UpdateWatch(endpoint)
        self.base, self.retrained = models.find(model_folder)
        self.files: list[LabelledFile] = []
        self.applications: dict[DeviceId, traffic.Application] = {}
        self.releases: list[ReleaseFigures] = []
        self.extra: list[Expectation] = []

    def run(self) -> Figures:
        """Tell the story from the first device to the last figure."""
        with ExitStack() as stack, tempfile.TemporaryDirectory() as made:
            stack.callback(self.close)
            self.updates.start()
            self._gather()
            self._first_release()
            self._retrained_release()
            recalibrated = Path(made) / "recalibrated.onnx"
            self._recalibrated_release(recalibrated)
            self._broken_release(recalibrated, Path(made) / "broken.onnx")
            self._calm()
            return self._figures()

    def close(self) -> None:
        """End the traffic and the connections."""
        for application in self.applications.values():
            application.stop()
        self.updates.stop()
        self.client.close()

    # The chapters

    def _gather(self) -> None:
        self.watcher.chapter(f"Five devices join {self.client.url}")
        self.files = corpus.collect()
        join = self.client.create_join_token(CreateJoinToken(uses=len(DEVICES)))
        with ThreadPoolExecutor(len(DEVICES)) as at_once:
            urls = at_once.map(lambda device: self._add(device, join.join_string), DEVICES)
            self.applications = {
                device: traffic.Application(device, url, self.files) for device, url in zip(DEVICES, urls, strict=True)
            }

    def _add(self, device: DeviceId, join_string: str) -> str:
        self.fleet.join(device, join_string)
        url = self.fleet.start_agent(device)
        self.watcher.progress(f"{device} serves on {url}")
        return url

    def _first_release(self) -> None:
        self.watcher.chapter(f"v1 ({self.base.name}) goes to every device")
        self._rollout("1", self.base.onnx_file, "the first", (PhaseSpec(percent=100),))
        for application in self.applications.values():
            application.start()
        self._calm()

    def _retrained_release(self) -> None:
        self.watcher.chapter(f"v2 ({self.retrained.name}, retrained) goes out in phases of 20, 60 and 100 %")
        phases = tuple(PhaseSpec(percent=percent) for percent in (20, 60, 100))
        killer = _KillInDownload(self)
        self._rollout("2", self.retrained.onnx_file, "retrained", phases, meanwhile=killer)
        resumed = self.updates.latest(SLOW_DEVICE).report.resumed_bytes
        seen = f"killed after {killer.bytes_at_kill:,} bytes, {resumed:,} bytes were not fetched again"
        self._expect(
            "an agent killed in its download resumed it and converged", bool(killer.bytes_at_kill and resumed), seen
        )

    def _recalibrated_release(self, file: Path) -> None:
        self.watcher.chapter("v3 is v2 with its final layer recalibrated on labelled files of this machine")
        before, after, bias = self._fit()
        models.recalibrated(self.retrained.onnx_file, bias, file)
        self.watcher.progress(f"negative log-likelihood on {len(self.files)} files: {before:.3f} -> {after:.3f} nats")
        self._rollout("3", file, "recalibrated", (PhaseSpec(percent=20), PhaseSpec(percent=100)))
        self._expect(
            "v3 fits the files of this machine better than v2", after < before, f"{before:.3f} -> {after:.3f} nats"
        )

    def _broken_release(self, good: Path, file: Path) -> None:
        self.watcher.chapter("v4 is broken: it loads and warms up, and answers NaN to most files")
        models.broken(good, file)
        phases = tuple(PhaseSpec(percent=percent) for percent in (20, 60, 100))
        rollout = self._rollout("4", file, "broken", phases)
        told = [entry for entry in self.client.executions(rollout.id) if entry.notified_at is not None]
        stopped = rollout.state is RolloutState.ROLLED_BACK and {entry.phase for entry in told} == {0}
        seen = f"{rollout.state.value}; {len(told)} of {rollout.devices} devices were told; {rollout.reason}"
        self._expect("the bad release was stopped in its first phase and taken back", stopped, seen)

    def _calm(self) -> None:
        self.watcher.progress(f"the application runs undisturbed for {CALM_S:.0f} s")
        time.sleep(CALM_S)

    # What the chapters are made of

    def _rollout(
        self,
        version: str,
        file: Path,
        note: str,
        phases: tuple[PhaseSpec, ...],
        meanwhile: Callable[[], None] | None = None,
    ) -> RolloutView:
        """Publish, roll out, wait for the end, and write down what it took."""
        release = ReleaseRef.parse(f"{traffic.MODEL}@{version}")
        self.client.publish(release.model, release.version, {DEFAULT_VARIANT: file})
        rollout = self.client.create_rollout(
            RolloutSpec(release=release, phases=phases, bake_s=BAKE_S, probation_s=PROBATION_S, silence_s=SILENCE_S)
        )
        rollout = self._until_over(rollout, meanwhile)
        told = [entry for entry in self.client.executions(rollout.id) if entry.notified_at is not None]
        updates = self.updates.wait_for(release, len(told))
        self.releases.append(
            figures.of_release(
                release=str(release),
                note=note,
                rollout=rollout.id,
                state=rollout.state.value,
                converge_s=(rollout.finished_at or time.time()) - rollout.created_at,
                updates=updates,
                samples=self._samples(),
            )
        )
        return rollout

    def _until_over(self, rollout: RolloutView, meanwhile: Callable[[], None] | None) -> RolloutView:
        deadline = time.monotonic() + ROLLOUT_TIMEOUT_S
        while rollout.state not in TERMINAL_ROLLOUT_STATES:
            if time.monotonic() > deadline:
                raise Unavailable(f"{rollout.release} is still {rollout.state.value} after {ROLLOUT_TIMEOUT_S:.0f} s")
            if meanwhile:
                meanwhile()
            counts = ", ".join(f"{number} {state.replace('_', ' ')}" for state, number in rollout.counts.items())
            self.watcher.progress(f"{rollout.release} {rollout.state.value}: {counts}. {rollout.reason}")
            time.sleep(POLL_S)
            rollout = self.client.rollout(rollout.id)
        return rollout

    def _fit(self) -> tuple[float, float, models.Floats]:
        """Ask the fleet about every labelled file and fit the bias: likelihood before, after, and the bias."""
        with httpx.Client(timeout=traffic.REQUEST_TIMEOUT_S) as http:
            url = self.applications[DEVICES[0]].url
            answers = [traffic.infer(http, url, traffic.request_body(file.content)) for file in self.files]
        probabilities = np.array([answer.probabilities for answer in answers], dtype=np.float32)
        targets = np.array([self.retrained.labels.index(file.label) for file in self.files])
        bias = models.fit_bias(probabilities, targets)
        likelihood = models.negative_log_likelihood
        return likelihood(probabilities, targets), likelihood(probabilities, targets, bias), bias

    def _samples(self) -> dict[DeviceId, list[traffic.Sample]]:
        return {device: list(application.samples) for device, application in self.applications.items()}

    def _expect(self, what: str, held: bool, seen: str) -> None:
        self.extra.append(Expectation(what, held, seen))

    def _figures(self) -> Figures:
        samples = self._samples()
        total = [sample for of_device in samples.values() for sample in of_device]
        failures = [sample for sample in total if sample.error]
        calm_p50, calm_p99 = figures.latencies(figures.idle(samples, self.updates.all()))
        devices = {device.id: device for device in self.client.devices()}
        not_modified = {name: _not_modified(devices[name]) for name in DEVICES}
        running = {name: _running(devices[name]) for name in DEVICES}
        tiny = next(release for release in self.releases if release.release.endswith("@3"))
        self._expect(
            "no request failed or was dropped", not failures, f"{len(failures)} of {len(total):,}{_first(failures)}"
        )
        self._expect(
            f"v3 moved less than {TINY_PERCENT:.0f} % of the full size, over MQTT",
            tiny.moved_percent < TINY_PERCENT and set(tiny.transports) == {"mqtt"},
            f"{tiny.moved_percent} %, {tiny.bytes_moved:,} bytes for {tiny.devices} devices",
        )
        self._expect(
            "every agent was answered 304 at least once", min(not_modified.values()) > 0, _listed(not_modified)
        )
        self._expect("all agents are on v3 at the end", set(running.values()) == {"3"}, _listed(running))
        return Figures(
            devices=DEVICES,
            requests=len(total),
            failed_requests=len(failures),
            idle_p50_s=calm_p50,
            idle_p99_s=calm_p99,
            not_modified=dict(not_modified),
            answers_by_version=figures.answers(samples),
            releases=tuple(self.releases),
            expectations=tuple(self.extra),
        )


class _KillInDownload:
    """Waits until the slow device is in the middle of its download, kills it, and starts it again."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self.bytes_at_kill = 0

    def __call__(self) -> None:
        downloads = self._story.fleet.data_of(SLOW_DEVICE) / "downloads"
        sizes = [path.stat().st_size for path in downloads.glob("*.part")] if downloads.is_dir() else []
        if self.bytes_at_kill or max(sizes, default=0) < KILL_AFTER_BYTES:
            return
        application, agent = self._story.applications[SLOW_DEVICE], self._story.fleet.agents[SLOW_DEVICE]
        application.pause()
        agent.kill()
        self.bytes_at_kill = max(path.stat().st_size for path in downloads.glob("*.part"))
        self._story.watcher.progress(f"{SLOW_DEVICE} killed with SIGKILL after {self.bytes_at_kill:,} bytes")
        application.resume(self._story.fleet.start_agent(SLOW_DEVICE))


def _not_modified(device: DeviceView) -> int:
    return device.heartbeat.not_modified if device.heartbeat else 0


def _running(device: DeviceView) -> str | None:
    models = device.reported.models if device.reported else ()
    return next((entry.running for entry in models if entry.model == traffic.MODEL), None)


def _listed(values: Mapping[DeviceId, object]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def _first(failures: Sequence[traffic.Sample]) -> str:
    return f"; the first: {failures[0].error}" if failures else ""
