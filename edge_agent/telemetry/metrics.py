"""Metrics for a collector of the device's owner, in OpenTelemetry's names; made only when an endpoint is configured.

The windows that go to the controller (`recorder`) and these are two views of the same requests, so this sits in front
of the recorder and passes every request on. It costs about 10 us a request, which is why it is not always there.
"""

from opentelemetry.sdk.metrics import MeterProvider

from common.ids import DeviceId, ModelName, Version
from common.observability import metric_reader, service_resource
from common.wire import LATENCY_BOUNDS_S
from edge_agent.telemetry.recorder import Recorder

SERVICE = "ferry-agent"


class ExportingRecorder:
    """`ferry.inference.duration` (seconds) and `ferry.inference.errors`, by model and version."""

    def __init__(self, windows: Recorder, device: DeviceId, endpoint: str) -> None:
        self._windows = windows
        self._provider = MeterProvider(
            [metric_reader(endpoint)], resource=service_resource(SERVICE, device), shutdown_on_exit=False
        )
        meter = self._provider.get_meter("agent")
        self._duration = meter.create_histogram(
            "ferry.inference.duration",
            unit="s",
            description="How long callers waited for an answer",
            explicit_bucket_boundaries_advisory=LATENCY_BOUNDS_S,
        )
        self._errors = meter.create_counter(
            "ferry.inference.errors", description="Requests that a release failed, whoever answered them"
        )

    def record(self, model: ModelName, version: Version, latency_s: float | None, *, error: bool) -> None:
        """One request to a release, as `Recorder.record`."""
        self._windows.record(model, version, latency_s, error=error)
        release = {"ferry.model": model, "ferry.version": version}
        if latency_s is not None:
            self._duration.record(latency_s, release)
        if error:
            self._errors.add(1, release)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
