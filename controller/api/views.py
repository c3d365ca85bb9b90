"""The controller's own values as the API shows them: one function a resource, from values to views.

No secret gets through here: a token's view has no hash, a device's none of its credentials.
"""

from collections import Counter
from collections.abc import Iterable

import msgspec

from common.ids import ReleaseRef
from common.monitoring.accuracy import accuracy
from common.monitoring.drift import Drift, worst
from common.wire.histogram import quantile_s
from controller.devices import Device, in_sync, presence
from controller.resources import (
    DeviceView,
    JoinTokenView,
    PhaseView,
    ReleaseView,
    RolloutView,
    RunsView,
    TelemetryView,
    UsageView,
    VariantView,
)
from controller.rollouts.model import Execution, ExecutionState, Rollout
from controller.store.port import DeviceTotals, Release, ReleaseTotals, Token


def device_view(device: Device, now: float) -> DeviceView:
    """The device as the API shows it at `now`."""
    return DeviceView(
        id=device.id,
        created_at=device.created_at,
        labels=device.labels,
        presence=presence(device, now),
        in_sync=in_sync(device),
        last_seen=device.last_seen,
        assigned=device.assigned,
        chosen=device.chosen,
        generation=device.generation,
        capabilities=device.capabilities,
        heartbeat=device.heartbeat,
        reported=device.reported,
        revision=device.revision,
    )


def release_view(release: Release) -> ReleaseView:
    """The release as the API shows it."""
    return ReleaseView(
        model=release.ref.model,
        version=release.ref.version,
        manifest=release.manifest,
        envelope=release.envelope,
        published_at=release.published_at,
        published_by=release.published_by,
    )


def telemetry_view(
    ref: ReleaseRef,
    since: float,
    totals: ReleaseTotals,
    used: DeviceTotals,
    *,
    drift: tuple[Drift, ...],
    variants: tuple[VariantView, ...],
) -> TelemetryView:
    """The sums as the API shows them."""
    p50_s, p90_s, p99_s = (quantile_s(totals.latency_counts, share) for share in (0.5, 0.9, 0.99))
    runs = sum(totals.run_counts)
    return TelemetryView(
        model=ref.model,
        version=ref.version,
        since=since,
        devices=totals.devices,
        requests=totals.requests,
        errors=totals.errors,
        p50_s=p50_s,
        p90_s=p90_s,
        p99_s=p99_s,
        queue_p50_s=quantile_s(totals.queue_counts, 0.5),
        queue_p99_s=quantile_s(totals.queue_counts, 0.99),
        queue_max_s=totals.queue_max_s if sum(totals.queue_counts) else None,
        refused=totals.refused,
        expired=totals.expired,
        cancelled=totals.cancelled,
        runs=RunsView(count=runs, rows=totals.run_rows, seconds=totals.run_sum_s, by_rows=totals.run_counts),
        usage=UsageView(**msgspec.structs.asdict(used)),
        accuracy=accuracy(totals.correct, totals.labelled),
        drift_verdict=worst(one.verdict for one in drift),
        drift=drift,
        variants=variants,
    )


def join_token_view(token: Token) -> JoinTokenView:
    """The claim as the API shows it: without its hash."""
    return JoinTokenView(
        id=token.id,
        created_at=token.created_at,
        expires_at=token.expires_at,
        uses_left=token.uses_left,
        labels=token.labels,
    )


def rollout_view(rollout: Rollout, executions: Iterable[Execution]) -> RolloutView:
    """The rollout as the API shows it, with its executions counted."""
    by_phase = Counter((execution.phase, execution.state) for execution in executions)
    return RolloutView(
        id=rollout.id,
        spec=rollout.spec,
        state=rollout.state,
        reason=rollout.reason,
        phases=tuple(_phase_view(rollout, index, by_phase) for index in range(len(rollout.phases))),
        devices=by_phase.total(),
        counts=_counts((state, number) for (_, state), number in by_phase.items()),
        created_at=rollout.created_at,
        created_by=rollout.created_by,
        finished_at=rollout.finished_at,
        traceparent=rollout.traceparent,
        revision=rollout.revision,
    )


def _phase_view(rollout: Rollout, index: int, by_phase: Counter[tuple[int, ExecutionState]]) -> PhaseView:
    phase = rollout.phases[index]
    counts = _counts((state, number) for (of, state), number in by_phase.items() if of == index)
    return PhaseView(
        index=index,
        spec=rollout.spec.phases[index],
        state=phase.state,
        approved=phase.approved,
        started_at=phase.started_at,
        baking_since=phase.baking_since,
        finished_at=phase.finished_at,
        reason=phase.reason,
        devices=sum(counts.values()),
        counts=counts,
    )


def _counts(numbers: Iterable[tuple[ExecutionState, int]]) -> dict[ExecutionState, int]:
    counts: Counter[ExecutionState] = Counter()
    for state, number in numbers:
        counts[state] += number
    return dict(sorted(counts.items()))
