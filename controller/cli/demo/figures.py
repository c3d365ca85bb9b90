"""What the demo measured: values only, how they are computed, and how they are shown.

Latencies are what the application saw, in seconds. A request counts as "during a swap" when it was sent between the
moment a device began an update and the moment that device committed it or took it back; as "idle" when no device was
updating at all.
"""

import math
from collections import Counter
from collections.abc import Sequence

import msgspec
from rich.table import Table

from common.ids import DeviceId, Version
from common.wire import UpdateReport
from controller.cli.demo.traffic import Sample, quantile
from controller.cli.output import size

MILLISECONDS = 1000.0


class Update(msgspec.Struct, frozen=True):
    """One device's finished update, as the device reported it."""

    device: DeviceId
    report: UpdateReport


class ReleaseFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One release's way through the fleet."""

    release: str
    note: str
    rollout: str
    state: str
    devices: int
    outcomes: dict[str, int]
    strategies: dict[DeviceId, str]
    transports: dict[str, int]
    bytes_moved: int
    """Over all devices, manifests included."""
    full_bytes: int
    """What the full artifacts would have been, over the same devices."""
    moved_percent: float
    resumed_bytes: int
    converge_s: float
    requests_during_swaps: int
    p50_s: float | None
    p99_s: float | None
    failed_requests: int


class Expectation(msgspec.Struct, frozen=True):
    """Something the story promised, and what was seen."""

    what: str
    held: bool
    seen: str


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The whole story in numbers."""

    devices: tuple[str, ...]
    requests: int
    failed_requests: int
    idle_p50_s: float | None
    idle_p99_s: float | None
    not_modified: dict[DeviceId, int]
    answers_by_version: dict[str, int]
    releases: tuple[ReleaseFigures, ...]
    expectations: tuple[Expectation, ...]

    @property
    def held(self) -> bool:
        return all(expectation.held for expectation in self.expectations)


def of_release(
    *, release: str, note: str, rollout: str, state: str, converge_s: float, updates: Sequence[Update],
    samples: dict[DeviceId, list[Sample]],
) -> ReleaseFigures:  # fmt: skip
    """Sum up one rollout from the devices' reports and the application's samples."""
    moved = sum(update.report.bytes_transferred for update in updates)
    full = sum(update.report.full_bytes for update in updates)
    swaps = [sample for update in updates for sample in during(samples[update.device], update.report)]
    return ReleaseFigures(
        release=release,
        note=note,
        rollout=rollout,
        state=state,
        devices=len(updates),
        outcomes=dict(Counter(update.report.outcome for update in updates)),
        strategies={update.device: update.report.strategy for update in updates},
        transports=dict(Counter(update.report.transport for update in updates)),
        bytes_moved=moved,
        full_bytes=full,
        moved_percent=round(100 * moved / full, 3) if full else 0.0,
        resumed_bytes=sum(update.report.resumed_bytes for update in updates),
        converge_s=round(converge_s, 2),
        requests_during_swaps=len(swaps),
        p50_s=_latency(swaps, 0.5),
        p99_s=_latency(swaps, 0.99),
        failed_requests=sum(1 for sample in swaps if sample.error),
    )


def during(samples: Sequence[Sample], report: UpdateReport) -> list[Sample]:
    """The requests that were sent while the device was at this update."""
    return [sample for sample in samples if report.started_at <= sample.sent_at <= report.finished_at]


def idle(samples: dict[DeviceId, list[Sample]], updates: Sequence[Update]) -> list[Sample]:
    """The requests that were sent while no device was updating."""
    spans = [(update.report.started_at, update.report.finished_at) for update in updates]
    return [
        sample
        for of_device in samples.values()
        for sample in of_device
        if not any(began <= sample.sent_at <= ended for began, ended in spans)
    ]


def answers(samples: dict[DeviceId, list[Sample]]) -> dict[str, int]:
    """How many requests each release answered."""
    return dict(Counter(Version(sample.version) for of_device in samples.values() for sample in of_device))


def latencies(samples: Sequence[Sample]) -> tuple[float | None, float | None]:
    """p50 and p99 in seconds; None of nothing."""
    return _latency(samples, 0.5), _latency(samples, 0.99)


def releases_table(figures: Figures) -> Table:
    """The releases, two lines each; it fits 80 columns."""
    table = Table(title="What each release cost", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("release", "how it came"):
        table.add_column(heading, no_wrap=True)
    for heading in ("moved of full", "took", "p50/p99 ms", "requests"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures.releases:
        table.add_row(
            f"{row.release.rpartition('@')[2]} {row.state.replace('_', ' ')}\n[dim]{row.note}",
            f"{_counted(dict(Counter(row.strategies.values())))}\n[dim]over {', '.join(sorted(row.transports))}",
            f"{row.moved_percent:.3g} %\n[dim]{size(row.bytes_moved)} of {size(row.full_bytes)}",
            f"{row.converge_s:.1f} s",
            latency(row.p50_s, row.p99_s),
            f"{row.requests_during_swaps:,}\n[dim]{row.failed_requests} failed",
        )
    during_swaps = sum(row.requests_during_swaps for row in figures.releases)
    others = figures.failed_requests - sum(row.failed_requests for row in figures.releases)
    table.add_row(
        "no update",
        "",
        "",
        "",
        latency(figures.idle_p50_s, figures.idle_p99_s),
        f"{figures.requests - during_swaps:,}\n[dim]{others} failed",
    )
    return table


def expectations_table(figures: Figures) -> Table:
    """What the story promised, one row each."""
    table = Table(title="What was promised", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for expectation in figures.expectations:
        mark = "[green]yes" if expectation.held else "[bold red]NO"
        table.add_row(mark, f"{expectation.what}\n[dim]{expectation.seen}")
    return table


def latency(p50_s: float | None, p99_s: float | None) -> str:
    """Two quantiles for people, in milliseconds."""
    if p50_s is None or p99_s is None:
        return "-"
    return f"{p50_s * MILLISECONDS:.0f} / {p99_s * MILLISECONDS:.0f}"


def _latency(samples: Sequence[Sample], share: float) -> float | None:
    value = quantile([sample.latency_s for sample in samples if not sample.error], share)
    return None if math.isnan(value) else round(value, 5)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items())) or "-"
