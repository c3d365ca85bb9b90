"""What `ferry release stats` shows of what devices measured."""

from typing import TYPE_CHECKING

from controller.cli.output import Columns, milliseconds, share, size

if TYPE_CHECKING:
    from common.monitoring.drift import FeatureDrift
    from controller.resources import TelemetryView


def drift_rows(view: "TelemetryView") -> list[list[str]]:
    """A row for each feature of each reference."""
    rows = [["TENSOR", "COUNTED", "VERDICT", "PSI", "BY CHANCE", "JS", "OUTSIDE", "NOT FINITE"]]
    return [*rows, *(_feature_row(feature) for drift in view.drift for feature in drift.features)]


def _feature_row(one: "FeatureDrift") -> list[str]:
    scores = [_score(one.psi), _score(one.psi_by_chance), _score(one.js_distance)]
    shares = [share(one.outside, 1), share(one.not_finite, 1)]
    return [f"{one.side} {one.tensor}", one.kind, one.verdict, *scores, *shares]


def variant_rows(view: "TelemetryView") -> list[list[str]]:
    """A row for each variant on each class of devices."""
    rows = [["CLASS", "VARIANT", "RUN", "DEVICES", "FAILED"]]
    for one in view.variants:
        rows.append([one.device_class, one.variant, milliseconds(one.run_s), str(one.devices), str(one.failed)])
    return rows


def _waited(one: "TelemetryView") -> str:
    if one.queue_max_s is None:
        return "-"
    p50, p99, longest = map(milliseconds, (one.queue_p50_s, one.queue_p99_s, one.queue_max_s))
    return f"p50 {p50}, p99 {p99}, {longest} at most"


def _runs(one: "TelemetryView") -> str:
    runs = one.runs
    if not runs.count:
        return "-"
    return f"{runs.count} with {runs.rows / runs.count:.1f} rows, {milliseconds(runs.seconds / runs.count)} each"


def _cpu(one: "TelemetryView") -> str:
    used = one.usage
    return f"{used.cpu_s:.1f} s, {share(used.cpu_s, used.seconds)} of a core" if used.seconds else "-"


def _memory(one: "TelemetryView") -> str:
    used = one.usage
    if not used.devices:
        return "-"
    proportional = f", proportional {size(used.pss_bytes_max)}" if used.pss_bytes_max else ""
    return f"{size(used.rss_bytes_max)} at most{proportional}"


def _accuracy(one: "TelemetryView") -> str:
    found = one.accuracy
    if found.share is None or found.low is None or found.high is None:
        return "no labels"
    bounds = f"{share(found.low, 1)} to {share(found.high, 1)}"
    return f"{share(found.share, 1)} ({bounds}), {found.correct} of {found.labelled} labelled"


def _drift(one: "TelemetryView") -> str:
    if not one.drift:
        return "inconclusive: nothing was sketched"
    told = "; ".join(
        f"{drift.observations} requests against {drift.reference_observations} samples" for drift in one.drift
    )
    return f"{one.drift_verdict} ({told})"


def _score(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"


STATS: "Columns[TelemetryView]" = {
    "RELEASE": lambda one: one.name,
    "DEVICES": lambda one: str(one.devices),
    "REQUESTS": lambda one: str(one.requests),
    "ERRORS": lambda one: f"{one.errors} ({share(one.errors, one.requests)})",
    "NOT RUN": lambda one: f"{one.refused} refused, {one.expired} too late, {one.cancelled} cancelled",
    "P50": lambda one: milliseconds(one.p50_s),
    "P90": lambda one: milliseconds(one.p90_s),
    "P99": lambda one: milliseconds(one.p99_s),
    "WAITED": _waited,
    "RUNS": _runs,
    "CPU": _cpu,
    "MEMORY": _memory,
    "LOST": lambda one: f"{one.usage.windows_lost} windows of telemetry",
    "BAD FILES": lambda one: f"{one.usage.files_bad} found, {one.usage.files_mended} mended",
    "ACCURACY": _accuracy,
    "DRIFT": _drift,
}
