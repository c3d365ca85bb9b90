"""Trying a release on the engine: load and self-test, watch, probe. Each function ends in the event that tells how it
went.
"""

import asyncio
import logging

from common.artifact import digest_of
from common.errors import FerryError, Unavailable
from common.ids import ModelName
from common.pipelines import PluginMissing
from common.wire import Shadow
from edge_agent.executor.acquire import interrupted
from edge_agent.executor.parts import Parts
from edge_agent.inference.engine import Beside
from edge_agent.inference.health import Health, Verdict, judge
from edge_agent.inference.opening import Extras
from edge_agent.inference.selftest import SamplesFile
from edge_agent.inference.serving import Candidate
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


async def warm(parts: Parts, model: ModelName, release: Installed) -> Candidate | ev.Event:
    """The candidate, ready to be switched to, or the event that says why not."""
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
    libraries = tuple(parts.slots.path(model, release.slot, name) for name in release.custom_ops or ())
    lines = sorted(f"{ref.digest} {name}" for name, ref in release.files.items())
    return Extras(release.pipeline or None, Beside(libraries, digest_of("\n".join(lines).encode())))


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
