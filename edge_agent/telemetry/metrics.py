"""Metrics for a collector of the device's owner, in OpenTelemetry's names; made only when an endpoint is configured.

The windows that go to the controller (`recorder`) and these are two views of the same requests, so this sits in front
of the recorder and passes everything on. It costs about 10 us an instrument and request, which is why it is not always
there. Names, units and attributes are those of the semantic conventions where there are any (`process.cpu.time`,
`cpu.mode`, `process.memory.usage`, `error.type`); for inference there are none but for generative models, so those are
ours, under `ferry.`.

Source: OpenTelemetry, "Semantic conventions for OS process metrics" and "General attributes".
"""

from collections.abc import Iterable, Sequence

import psutil
from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider

from common.ids import DeviceId, ModelName, Version
from common.monitoring.sketching import Sampled
from common.observability import metric_reader, service_resource
from common.wire import LATENCY_BOUNDS_S, RUN_ROWS_BOUNDS, NotRun
from edge_agent.telemetry.recorder import Recorder

SERVICE = "ferry-agent"


class ExportingRecorder:
    """What each release does, with `ferry.model` and `ferry.version`, and what the process uses."""

    def __init__(self, windows: Recorder, device: DeviceId, endpoint: str) -> None:
        self._windows = windows
        self._provider = MeterProvider(
            [metric_reader(endpoint)], resource=service_resource(SERVICE, device), shutdown_on_exit=False
        )
        meter = self._provider.get_meter("agent")
        self._duration = _seconds(meter, "ferry.inference.duration", "How long callers waited for an answer")
        self._queue = _seconds(meter, "ferry.inference.queue.duration", "How long requests waited for a core")
        self._rows = meter.create_histogram(
            "ferry.inference.batch.size",
            unit="{row}",
            description="Rows in one run of the engine",
            explicit_bucket_boundaries_advisory=RUN_ROWS_BOUNDS,
        )
        self._errors = meter.create_counter(
            "ferry.inference.errors", unit="{request}", description="Requests that a release failed, whoever answered"
        )
        self._not_run = meter.create_counter(
            "ferry.inference.not_run", unit="{request}", description="Requests that were never run; error.type says why"
        )
        self._labels = meter.create_counter(
            "ferry.inference.labels", unit="{label}", description="Labelled answers; ferry.correct says whether right"
        )
        _observe_process(meter)

    def record(self, model: ModelName, version: Version, latency_s: float | None, *, error: bool) -> None:
        """One request to a release, as `Recorder.record`."""
        self._windows.record(model, version, latency_s, error=error)
        release = {"ferry.model": model, "ferry.version": version}
        if latency_s is not None:
            self._duration.record(latency_s, release)
        if error:
            self._errors.add(1, release)

    def ran(self, model: ModelName, version: Version, rows: int, run_s: float, queue_s: Sequence[float]) -> None:
        """One run of the engine, as `Recorder.ran`."""
        self._windows.ran(model, version, rows, run_s, queue_s)
        release = {"ferry.model": model, "ferry.version": version}
        self._rows.record(rows, release)
        for waited_s in queue_s:
            self._queue.record(waited_s, release)

    def answered(
        self, model: ModelName, version: Version, *, rows: int, run_s: float, queue_s: float, latency_s: float
    ) -> None:
        """One request that was run alone and answered well, as `Recorder.answered`."""
        self.ran(model, version, rows, run_s, (queue_s,))
        self.record(model, version, latency_s, error=False)

    def not_run(self, model: ModelName, version: Version, why: NotRun) -> None:
        """One request that was never run, as `Recorder.not_run`."""
        self._windows.not_run(model, version, why)
        self._not_run.add(1, {"ferry.model": model, "ferry.version": version, "error.type": why})

    def labelled(self, model: ModelName, version: Version, count: int, correct: int) -> None:
        """Labels of answers, as `Recorder.labelled`."""
        self._windows.labelled(model, version, count, correct)
        release = {"ferry.model": model, "ferry.version": version}
        self._labels.add(correct, {**release, "ferry.correct": True})
        self._labels.add(count - correct, {**release, "ferry.correct": False})

    def sampled(self, model: ModelName, version: Version, sample: Sampled) -> None:
        """A request that is sampled for drift: for the controller only."""
        self._windows.sampled(model, version, sample)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _seconds(meter: Meter, name: str, description: str) -> Histogram:
    return meter.create_histogram(
        name, unit="s", description=description, explicit_bucket_boundaries_advisory=LATENCY_BOUNDS_S
    )


def _observe_process(meter: Meter) -> None:
    """CPU and memory of the process, read when they are exported."""
    process = psutil.Process()

    def cpu(_: CallbackOptions) -> Iterable[Observation]:
        times = process.cpu_times()
        return Observation(times.user, {"cpu.mode": "user"}), Observation(times.system, {"cpu.mode": "system"})

    def memory(_: CallbackOptions) -> Iterable[Observation]:
        return (Observation(process.memory_info().rss),)

    meter.create_observable_counter("process.cpu.time", (cpu,), unit="s", description="CPU time of the agent")
    meter.create_observable_up_down_counter("process.memory.usage", (memory,), unit="By", description="Resident memory")
