"""Releases and the patches between their files."""

from common.errors import NotFound
from common.ids import ModelName, ReleaseRef, Version, parse_device_id, parse_digest, parse_model_name
from controller.api.pages import page_of
from controller.api.route import Answer, Call, route
from controller.api.views import release_view, telemetry_view
from controller.measurements import drift_in, variants_in
from controller.resources import (
    CollectedView,
    CollectGarbage,
    Page,
    PatchQuery,
    PatchView,
    PublishRelease,
    ReleaseQuery,
    ReleaseView,
    TelemetryQuery,
    TelemetryView,
)
from controller.store.port import Patch, Release, Transaction


@route("POST", "/v1/releases", summary="Publish a release made of uploaded blobs", statuses=(201, 200))
async def publish(call: Call, body: PublishRelease) -> Answer[ReleaseView]:
    """201 when it is new, 200 when the very same release exists, 409 when that version has other bytes."""

    async def act() -> Answer[ReleaseView]:
        release, created = await call.deps.releases.publish(
            body.model,
            body.version,
            body.variants,
            call.who,
            body.self_tests,
            pipelines=body.pipelines,
            custom_ops=body.custom_ops,
            serving=body.serving,
            references=body.references,
        )
        return Answer(value=release_view(release), status=201 if created else 200)

    answer = await call.perform(act)
    call.deps.patches.nudge()
    return answer


@route("GET", "/v1/releases", summary="List releases")
async def index(call: Call, query: ReleaseQuery) -> Answer[Page[ReleaseView]]:
    """By model and version."""
    after = ReleaseRef.parse(query.after, "after") if query.after else None
    key = (after.model, after.version) if after else None
    model = parse_model_name(query.model) if query.model else None
    found = await call.read(lambda tx: tx.releases.page(key, query.limit + 1, model))
    return Answer(value=page_of([release_view(release) for release in found], query.limit, lambda view: view.name))


@route("GET", "/v1/releases/{model}/{version}", summary="Show a release and its manifest")
async def show(call: Call, model: ModelName, version: Version) -> Answer[ReleaseView]:
    """The release, or 404."""
    return Answer(value=release_view(await call.read(lambda tx: _existing(tx, ReleaseRef(model, version)))))


@route("GET", "/v1/releases/{model}/{version}/telemetry", summary="Sum up what devices measured of a release")
async def telemetry(call: Call, model: ModelName, version: Version, query: TelemetryQuery) -> Answer[TelemetryView]:
    """Requests, errors, latency, waiting, accuracy, drift and resource use over all devices, or one device, of windows
    that ended in the last `since_s` seconds. Sketches for drift are kept in spans of ten minutes. `variants` are what
    devices found of them when they took the release, whenever that was.
    """
    ref, since = ReleaseRef(model, version), call.deps.clock.now() - query.since_s
    devices = None if query.device is None else [parse_device_id(query.device, "device")]

    def work(tx: Transaction) -> TelemetryView:
        release, log = _existing(tx, ref), tx.telemetry
        return telemetry_view(
            release.ref,
            since,
            log.totals(ref, since, devices),
            log.usage(ref, since, devices),
            drift=drift_in(tx, release, since, devices),
            variants=variants_in(tx, release, devices),
        )

    return Answer(value=await call.read(work))


@route("GET", "/v1/patches", summary="List the patches that rebuild an artifact")
async def patches(call: Call, query: PatchQuery) -> Answer[Page[PatchView]]:
    """Every patch to `target` that was asked for, with its state and size."""
    target = parse_digest(query.target, "target")
    found = await call.read(lambda tx: tx.patches.for_target(target))
    return Answer(value=Page(items=tuple(map(_patch_view, found))))


@route("POST", "/v1/gc", summary="Remove blobs that nothing needs")
async def collect(call: Call, body: CollectGarbage) -> Answer[CollectedView]:
    """What no release and no patch refers to, and is old enough not to be part of an upload under way."""

    async def act() -> Answer[CollectedView]:
        collected = await call.deps.releases.collect_garbage(call.who, body.min_age_s)
        return Answer(value=CollectedView(count=collected.count, bytes=collected.bytes))

    return await call.perform(act)


def _existing(tx: Transaction, ref: ReleaseRef) -> Release:
    release = tx.releases.get(ref)
    if release is None:
        raise NotFound(f"there is no release {ref}", field="release", fix="see: ferry release list")
    return release


def _patch_view(patch: Patch) -> PatchView:
    return PatchView(
        base=patch.base,
        target=patch.target,
        codec=patch.codec,
        state=patch.state,
        created_at=patch.created_at,
        patch=patch.patch,
        reason=patch.reason,
    )
