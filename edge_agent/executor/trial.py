"""Trying a release on the engine: load and self-test, watch, probe. Each function ends in the event that tells how it
went.
"""

import asyncio
import logging
from pathlib import Path

from common.errors import FerryError, Unavailable
from common.ids import ModelName
from common.pipelines import PluginMissing
from common.wire import Shadow
from edge_agent.executor.acquire import interrupted
from edge_agent.executor.parts import Parts
from edge_agent.inference.engine import Beside, Session
from edge_agent.inference.health import Health, Verdict, judge
from edge_agent.inference.loaded import Statistics
from edge_agent.inference.memory import NoMemory, Room
from edge_agent.inference.niced import run_niced
from edge_agent.inference.opening import Extras, Load
from edge_agent.inference.selftest import SamplesFile
from edge_agent.inference.serving import Candidate, Served
from edge_agent.inference.trial import ModelRejected
from edge_agent.update import Installed
from edge_agent.update import events as ev

logger = logging.getLogger(__name__)

SERVE_ATTEMPTS = 3
"""A start-up load is tried this often while memory is short."""

_VERDICTS: dict[Verdict, ev.Verdict] = {
    Verdict.PASS: "pass",
    Verdict.FAIL: "fail",
    Verdict.INCONCLUSIVE: "inconclusive",
}


async def load(parts: Parts, model: ModelName, release: Installed) -> Candidate | None:
    """The release in its slot, loaded, warm and tested; None when the slot does not hold it (any more)."""
    size = size_of(release)
    before = parts.memory.used() if parts.memory else None
    candidate = await _load(parts, model, release)
    if candidate and parts.memory:
        parts.memory.learn(model, size, before)
    return candidate


def size_of(release: Installed) -> int:
    """Bytes of its files, its samples aside: they are read and let go."""
    samples = release.self_test.samples if release.self_test else None
    return sum(ref.size for name, ref in release.files.items() if name != samples)


async def _load(parts: Parts, model: ModelName, release: Installed) -> Candidate | None:
    """The release in its slot, loaded, warm and tested; None when the slot does not hold it (any more)."""
    if not await asyncio.to_thread(parts.slots.verify, model, release.slot, release.files, release.manifest):
        return None
    path = parts.slots.path(model, release.slot, release.onnx_file)
    candidate = await parts.server.prepare(
        model,
        release.version,
        path,
        release.inputs,
        release.outputs,
        samples=_samples(parts, model, release),
        extras=_extras(parts, model, release),
        serving=release.serving,
        reference=parts.slots.path(model, release.slot, release.reference) if release.reference else None,
        load=_loader(parts, model, release),
    )
    if tested := candidate.tested:
        extra = {"model": model, "version": release.version, "samples": tested.samples, "latency_s": tested.latency_s}
        logger.info("self-test passed", extra=extra)
    return candidate


async def serve(parts: Parts, model: ModelName, release: Installed) -> ev.Event | None:
    """Let the installed release answer, after a start; None when all is well.

    It has proven itself here, so being slow today is worth a warning and no more.
    """
    for attempt in range(SERVE_ATTEMPTS):
        try:
            candidate = await load(parts, model, release)
        except Unavailable as error:
            trouble: FerryError = error
            await asyncio.sleep(parts.limits.backoff.delay_s(attempt, parts.chance.random()))
            continue
        except FerryError as error:
            trouble = error
            break
        if candidate is None:
            return ev.SlotLost(at=parts.clock.now(), slot=release.slot)
        if candidate.tested and candidate.tested.slowness:
            logger.warning("slower than allowed: %s", candidate.tested.slowness, extra={"model": model})
        parts.server.switch(candidate)
        await parts.server.commit(model)
        return None
    mendable = isinstance(trouble, PluginMissing)
    return ev.Unservable(at=parts.clock.now(), code=trouble.code, detail=str(trouble), mendable=mendable)


def room(parts: Parts, model: ModelName, release: Installed, installed: Installed | None) -> ev.Event | None:
    """The event that says why `release` cannot be loaded now; None when it can. What serves now is `installed`."""
    serving = model in parts.server.in_memory()
    others = parts.server.in_memory() - {model}
    if parts.limits.models_max and len(others) >= parts.limits.models_max:
        detail = f"{len(others)} models are served and models_max is {parts.limits.models_max}"
        return ev.Interrupted(at=parts.clock.now(), code="no_room_for_model", detail=detail)
    if parts.memory is None:
        return None
    size = size_of(release)
    held = size_of(installed) if serving and installed else 0
    found = parts.memory.room(model, size, serving=held)
    if found is Room.BESIDE:
        return None
    detail = parts.memory.in_words(model, size)
    if found is Room.INSTEAD:
        return ev.NoRoomBeside(at=parts.clock.now(), detail=detail)
    return ev.Interrupted(at=parts.clock.now(), code=NoMemory.code, detail=detail)


async def rest(parts: Parts, model: ModelName, release: Installed, *, build: bool) -> ev.Event | None:
    """Get the installed release ready to be loaded by the first request; with `build` its optimised graph too."""
    if not await asyncio.to_thread(parts.slots.verify, model, release.slot, release.files, release.manifest):
        return ev.SlotLost(at=parts.clock.now(), slot=release.slot)
    cache, path = parts.optimised, parts.slots.path(model, release.slot, release.onnx_file)
    if build and cache:
        beside = _beside(parts, model, release)
        await run_niced(
            lambda: cache.takes(path, beside) and cache.build(model, path, release.identity),
            f"prewarm-{model}@{release.version}",
        )
    await parts.server.rest(model, described(model, release))
    return None


def described(model: ModelName, release: Installed) -> Served:
    """A release that has answered nothing yet."""
    return Served(
        model=model,
        version=release.version,
        inputs=release.inputs,
        outputs=release.outputs,
        current=True,
        probation=False,
        statistics=Statistics(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0),
    )


async def warm(
    parts: Parts, model: ModelName, release: Installed, installed: Installed | None = None
) -> Candidate | ev.Event:
    """The candidate, ready to be switched to, or the event that says why not. What serves now is `installed`."""
    if not await needs_no_load(parts, model, release) and (no_room := room(parts, model, release, installed)):
        return no_room
    try:
        candidate = await load(parts, model, release)
    except ModelRejected as error:
        return ev.ModelRefused(at=parts.clock.now(), code=error.code, detail=str(error))
    except (FerryError, OSError) as error:
        return interrupted(error, parts.clock.now())
    if candidate is None:
        return ev.SlotLost(at=parts.clock.now(), slot=release.slot)
    if candidate.tested and candidate.tested.slowness:
        await parts.server.discard(candidate)
        return ev.TooSlow(at=parts.clock.now(), detail=candidate.tested.slowness)
    return candidate


def _loader(parts: Parts, model: ModelName, release: Installed) -> Load:
    """The cheapest way to a session: on one that runs, from the kept graph, or plainly."""
    cache, live, beside = parts.optimised, parts.live, _beside(parts, model, release)

    def full(path: Path) -> Session:
        if cache and cache.takes(path, beside):
            return cache.load(model, path, release.identity)
        return parts.server.load_plainly(path, beside)

    if live is None or beside.libraries:
        return full
    return lambda path: live.load(model, path, full)


async def needs_no_load(parts: Parts, model: ModelName, release: Installed) -> bool:
    """Whether `release` can run on a session that is in memory; native code of its own has to be loaded."""
    if parts.live is None or release.custom_ops:
        return False
    path = parts.slots.path(model, release.slot, release.onnx_file)
    return await asyncio.to_thread(parts.live.suits, model, path)


async def shadow(parts: Parts, candidate: Candidate, terms: Shadow) -> ev.Event:
    """Put live requests to the candidate too for as long as the terms say."""
    ends_at = parts.clock.monotonic() + terms.for_s
    with parts.server.mirroring(candidate, terms) as mirror:
        while (left_s := ends_at - parts.clock.monotonic()) > 0:
            await asyncio.sleep(min(parts.limits.health_s, left_s))
            mirror.oversee()
        found = mirror.report()
    return ev.Shadowed(at=parts.clock.now(), found=found)


def _samples(parts: Parts, model: ModelName, release: Installed) -> SamplesFile | None:
    test = release.self_test
    return SamplesFile(parts.slots.path(model, release.slot, test.samples), test) if test else None


def _extras(parts: Parts, model: ModelName, release: Installed) -> Extras:
    return Extras(release.pipeline or None, _beside(parts, model, release))


def _beside(parts: Parts, model: ModelName, release: Installed) -> Beside:
    libraries = tuple(parts.slots.path(model, release.slot, name) for name in release.custom_ops or ())
    return Beside(libraries, release.identity)


async def watch(parts: Parts, model: ModelName, switched_at: float, probation_s: float) -> ev.Event:
    """Look now and again, until the release fails or its time is up. `switched_at` is on the monotonic clock."""
    while True:
        elapsed_s = parts.clock.monotonic() - switched_at
        health = parts.server.health(model)
        verdict = _VERDICTS[judge(health)]
        if verdict == "fail" or elapsed_s >= probation_s:
            return ev.HealthChecked(
                at=parts.clock.now(),
                verdict=verdict,
                elapsed_s=elapsed_s,
                detail=_in_words(health),
                split=parts.server.sides(model),
            )
        await asyncio.sleep(min(parts.limits.health_s, probation_s - elapsed_s))


async def probe(parts: Parts, model: ModelName) -> ev.Event:
    """Requests of our own, judged together with those that came."""
    probed = await parts.server.self_probe(model, parts.limits.probe_requests)
    real = parts.server.health(model)
    both = Health(real.requests + probed.requests, real.errors + probed.errors, probed.consecutive)
    return ev.Probed(at=parts.clock.now(), verdict=_VERDICTS[judge(both)], detail=_in_words(both))


def _in_words(health: Health) -> str:
    return f"{health.errors} of {health.requests} requests failed on the new release"
