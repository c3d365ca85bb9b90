"""Logs and traces, set up the same way in every program.

Logs are one JSON object a line with the trace they belong to, or plain lines on a terminal. Traces cross process
borders as a W3C `traceparent` string, in HTTP headers and inside MQTT payloads. Nothing leaves the machine unless an
OTLP endpoint is configured (`FERRY_OTLP_ENDPOINT`, or OpenTelemetry's own `OTEL_EXPORTER_OTLP_ENDPOINT`).

OpenTelemetry's SDK is loaded only by whoever makes spans or metrics: a device that passes a trace on needs its API
alone, and is spared 3 MB of memory.
"""

import logging
import os
import sys
from typing import IO, TYPE_CHECKING, Any

import msgspec
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

_PROPAGATOR = TraceContextTextMapPropagator()
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (Unix seconds), level, logger, message, trace id, and whatever `extra` held."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            entry["trace_id"] = format(context.trace_id, "032x")
            entry["span_id"] = format(context.span_id, "016x")
        entry.update({key: value for key, value in vars(record).items() if key not in _STANDARD_FIELDS})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry, enc_hook=str).decode()


def setup_logging(level: str = "info", stream: IO[str] | None = None) -> None:
    """Send all logs to `stream` (stderr): plain lines on a terminal, JSON otherwise."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(plain if stream.isatty() else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def otlp_endpoint(configured: str = "") -> str:
    """Where to send traces and metrics; empty means nowhere."""
    return configured or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")


def setup_tracing(service: str, instance: str, endpoint: str = "") -> "TracerProvider":
    """Make spans and, when `endpoint` is given, export them in batches over OTLP/HTTP. Call `shutdown()` at the end."""
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(resource=service_resource(service, instance))
    if endpoint:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    trace.set_tracer_provider(provider)
    return provider


def metric_reader(endpoint: str) -> "MetricReader":
    """Exports metrics over OTLP/HTTP to `endpoint`, as often as OTEL_METRIC_EXPORT_INTERVAL says (default: 60 s)."""
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    return PeriodicExportingMetricReader(OTLPMetricExporter(f"{endpoint.rstrip('/')}/v1/metrics"))


def service_resource(service: str, instance: str) -> "Resource":
    """Who is talking, in OpenTelemetry's semantic conventions."""
    from opentelemetry.sdk.resources import Resource

    return Resource.create({"service.name": service, "service.instance.id": instance})


def traceparent_of(context: Context | None = None) -> str | None:
    """The current (or given) trace position as a W3C `traceparent`, or None outside any trace."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context)
    return carrier.get("traceparent")


def context_from(traceparent: str | None) -> Context:
    """The context to continue a trace that another process began; an absent or bad value begins a new one."""
    return _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {})
