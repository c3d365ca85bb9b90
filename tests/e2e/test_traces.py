"""One trace leads from the operator's command through MQTT to the swap on the device, if somebody collects traces."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.e2e.world import World, until

pytestmark = pytest.mark.e2e


class Collector:
    """Receives OTLP over HTTP, as an OpenTelemetry collector does.

    `spans` are (trace id, service, span name), `metrics` are (service, metric name).
    """

    def __init__(self) -> None:
        self.spans: set[tuple[str, str, str]] = set()
        self.metrics: set[tuple[str, str]] = set()
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(self.path, body, self.headers.get("Content-Encoding", ""))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Tests are quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, path: str, body: bytes, encoding: str) -> None:
        """Keep what one export says."""
        self.paths.add(path)
        assert not encoding, "the exporters do not compress unless told to"
        if path == "/v1/metrics":
            self._take_metrics(ExportMetricsServiceRequest.FromString(body))
            return
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.add((span.trace_id.hex(), attributes["service.name"], span.name))

    def _take_metrics(self, request: ExportMetricsServiceRequest) -> None:
        for resource in request.resource_metrics:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_metrics:
                self.metrics |= {(attributes["service.name"], metric.name) for metric in scope.metrics}

    def close(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_a_rollout_is_one_trace_from_the_request_to_the_switch(
    tmp_path: Path, real_models: tuple[Path, Path], collector: Collector
) -> None:
    world = World(tmp_path, {"FERRY_OTLP_ENDPOINT": collector.url})
    try:
        world.start()
        world.add_device("one", otlp_endpoint=collector.url)
        release = world.publish("1", real_models[0])
        world.finish(world.begin(release))
        trace = world.client.trace_id
        world.answer("one", b"any content at all")
        services = until(lambda: both_programs(collector, trace), "both programs exported spans of the trace", world)
    finally:
        world.stop()
    names = {name for of, _, name in collector.spans if of == trace}
    assert services == {"ferry-controller", "ferry-agent"}
    assert any("switch" in name for name in names), names
    assert {("ferry-controller", "http.server.request.duration"), ("ferry-agent", "ferry.inference.duration")} <= (
        collector.metrics
    )


def both_programs(collector: Collector, trace: str) -> set[str] | None:
    services = {service for of, service, _ in collector.spans if of == trace}
    switched = any("switch" in name for of, _, name in collector.spans if of == trace)
    return services if len(services) == 2 and switched else None


def test_nothing_is_sent_unless_an_endpoint_is_configured(
    world: World, real_models: tuple[Path, Path], collector: Collector
) -> None:
    world.add_device("one")
    world.roll_out("1", real_models[0])
    assert collector.paths == set()
