"""The controller's metrics: OpenTelemetry instruments, read by Prometheus at `/metrics`, sent over OTLP if configured.

Every controller has a provider and a registry of its own, nothing is global, so that several can live in one process.
Names follow OpenTelemetry's conventions (`http.server.request.duration` is theirs); in Prometheus dots are underscores.
Metrics hold counts and durations, never names of devices or secrets.
"""

import time
from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from common.observability import metric_reader, service_resource

SERVICE = "ferry-controller"
HTTP_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""The bucket bounds that OpenTelemetry advises for HTTP durations."""


class Metrics:
    """Makes meters and shows what they measured; `close` at the end."""

    def __init__(self, instance: str, otlp_endpoint: str = "") -> None:
        self._registry = CollectorRegistry()
        readers: list[MetricReader] = [PrometheusMetricReader(registry=self._registry, scope_info_enabled=False)]
        if otlp_endpoint:
            readers.append(metric_reader(otlp_endpoint))
        self._provider = MeterProvider(readers, resource=service_resource(SERVICE, instance), shutdown_on_exit=False)
        self.meter: Meter = self._provider.get_meter("controller")
        self._devices = self.meter.create_gauge("ferry.devices", description="Devices by presence")
        self._rollouts = self.meter.create_gauge("ferry.rollouts.active", description="Rollouts under way")

    def text(self) -> tuple[bytes, str]:
        """Everything measured so far in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def set_fleet(self, devices: Mapping[str, int], rollouts_active: int) -> None:
        """How many devices there are of each presence, and how many rollouts are under way."""
        for presence, count in devices.items():
            self._devices.set(count, {"presence": presence})
        self._rollouts.set(rollouts_active)

    def close(self) -> None:
        """Send what is left, then stop."""
        self._provider.shutdown()


def timing_requests(meter: Meter) -> Middleware:
    """An aiohttp middleware that measures how long requests take, by route."""
    duration = meter.create_histogram(
        "http.server.request.duration", unit="s", explicit_bucket_boundaries_advisory=HTTP_BOUNDS_S
    )

    @web.middleware
    async def timed(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.perf_counter()
        response = await handler(request)
        resource = request.match_info.route.resource
        attributes: dict[str, str | int] = {
            "http.request.method": request.method,
            "http.response.status_code": response.status,
            "http.route": resource.canonical if resource else "",
        }
        duration.record(time.perf_counter() - began, attributes)
        return response

    return timed
