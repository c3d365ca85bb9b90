"""An engine that tries a release on each execution provider that the device's owner allows, and keeps the fastest.

Every provider gets a session of its own and the same made-up inputs; what it answers is held against the CPU. Sessions
that were not chosen are closed. The choice is remembered (`edge_agent.inference.provider_memory`), so a restart loads
one session, as without a probe. All this happens on the thread that loads, at its low priority, for all providers
alike.
"""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.artifact.tensors import Array
from common.errors import FerryError, InvalidInput
from edge_agent.inference.engine import NOTHING, Beside, EngineFailure
from edge_agent.inference.ort import OrtEngine, OrtSession
from edge_agent.inference.provider_memory import Entry, ProviderMemory, key_of
from edge_agent.inference.providers import CPU, ROUNDS, WARM_UP_RUNS, Choice, Rating, candidates, choose, turns
from edge_agent.inference.scheduling import agree
from edge_agent.inference.tensors import made_up, synthetic
from edge_agent.inference.timelimit import stopped_after

logger = logging.getLogger(__name__)

RUN_S_MAX = 30.0
"""A provider that takes longer for one run is out."""
PROBE_S_MAX = 30.0
"""No further round begins after this."""


class Question(NamedTuple):
    """Inputs, and what the CPU answers to them."""

    feeds: Mapping[str, Array]
    expected: Mapping[str, Array]


class ProbingEngine:
    """`engine` with a choice among the `allowed` providers that its runtime has. `memory` outlives the program."""

    def __init__(self, engine: OrtEngine, allowed: Sequence[str], memory: ProviderMemory) -> None:
        self.platform = engine.platform
        self._engine = engine
        self._memory = memory
        self._providers = candidates(allowed, engine.providers())
        self._last: dict[Path, str] = {}
        if missing := sorted(set(allowed) - set(self._providers)):
            logger.warning("this runtime has no %s", ", ".join(missing))

    def load(self, path: Path, beside: Beside = NOTHING) -> OrtSession:
        """See `Engine.load`."""
        if len(self._providers) == 1:
            return self._engine.load(path, beside)
        key, known = self._known(path, beside)
        if known is None:
            return self._probed(path, beside, key)
        try:
            return self._engine.load_on(path, beside, known.provider)
        except EngineFailure:
            if known.provider == CPU:
                raise
            logger.warning("%s does not load any more; the CPU is used", known.provider)
            return self._engine.load(path, beside)

    @property
    def version(self) -> str:
        """The runtime's version."""
        return self._engine.version

    @property
    def providers(self) -> tuple[str, ...]:
        """Those that releases are tried on, the CPU first."""
        return self._providers

    @property
    def setup(self) -> str:
        """See `OrtEngine.setup`."""
        return self._engine.setup

    def on_cpu(self, path: Path, beside: Beside) -> bool:
        """See `Optimiser.on_cpu`. `doubt` is about this release from now on."""
        if len(self._providers) > 1:
            _, known = self._known(path, beside)
            if known is None or known.provider != CPU:
                return False
        return self._engine.on_cpu(path, beside)

    def optimise(self, path: Path, target: Path) -> OrtSession:
        """See `Optimiser.optimise`."""
        return self._engine.optimise(path, target)

    def load_optimised(self, path: Path) -> OrtSession:
        """See `Optimiser.load_optimised`."""
        return self._engine.load_optimised(path)

    def doubt(self, path: Path) -> bool:
        """See `Engine.doubt`: another provider than the CPU may be to blame."""
        key = self._last.get(path, "")
        choice = self._memory.get(key).choice
        if choice is None or choice.provider == CPU:
            return False
        seen = {**choice.seen, choice.provider: "the release failed its checks on it"}
        self._memory.put(key, Entry(Choice(CPU, seen)))
        return True

    def _known(self, path: Path, beside: Beside) -> tuple[str, Choice | None]:
        """The release's key, and the provider that was chosen for it, if one was."""
        key = self._last[path] = key_of(beside.identity or str(path), self._engine.version, self._providers)
        return key, self._memory.get(key).choice

    def _probed(self, path: Path, beside: Beside, key: str) -> OrtSession:
        """Try all providers, one of them stays loaded. A release that takes no made-up input (open axes that may not be
        of any length) stays on the CPU: there is nothing to hold answers against.
        """
        sessions = {CPU: self._engine.load(path, beside)}
        try:
            question = _question(sessions[CPU])
        except (EngineFailure, InvalidInput) as error:
            self._memory.put(
                key, Entry(Choice(CPU, {CPU: f"not compared, it takes no made-up input: {error.message}"}))
            )
            return sessions[CPU]
        except BaseException:
            sessions[CPU].close()
            raise
        try:
            died = self._memory.get(key).died
            ratings = [Rating(provider, trouble="the program died while it was tried") for provider in died]
            for provider in self._providers[1:]:
                if provider not in died:
                    self._memory.put(key, Entry(trying=provider, died=died))
                    try:
                        sessions[provider] = self._tried(path, beside, provider, question)
                    except FerryError as error:
                        ratings.append(Rating(provider, trouble=error.message))
            choice = choose([*ratings, *_timed(sessions, question.feeds)])
            self._memory.put(key, Entry(choice, died=died))
        except BaseException:
            for session in sessions.values():
                session.close()
            raise
        logger.info("execution provider %s", choice.provider, extra={"model": path.name, "seen": choice.seen})
        chosen = sessions.pop(choice.provider)
        for session in sessions.values():
            session.close()
        return chosen

    def _tried(self, path: Path, beside: Beside, provider: str, question: Question) -> OrtSession:
        """A session on the provider that answers as the CPU does, warmed up."""
        session = self._engine.load_on(path, beside, provider)
        try:
            for _ in range(WARM_UP_RUNS):
                _check(_run(session, question.feeds), question)
        except BaseException:
            session.close()
            raise
        return session


def _question(session: OrtSession) -> Question:
    """What to ask: numbers that tell answers apart, or zeros for a model that takes no such ones."""
    with contextlib.suppress(EngineFailure, InvalidInput):
        feeds = made_up(session.inputs)
        return Question(feeds, _run(session, feeds))
    feeds = synthetic(session.inputs)
    return Question(feeds, _run(session, feeds))


def _check(found: Mapping[str, Array], question: Question) -> None:
    if not agree(found, question.expected):
        raise EngineFailure("it answers otherwise than the CPU")


def _timed(sessions: Mapping[str, OrtSession], feeds: Mapping[str, Array]) -> list[Rating]:
    providers, began = tuple(sessions), time.perf_counter()
    seconds: dict[str, list[float]] = {provider: [] for provider in providers}
    failed: dict[str, str] = {}
    for number in range(ROUNDS):
        if number and time.perf_counter() - began > PROBE_S_MAX:
            break
        for provider in turns(providers, number):
            try:
                seconds[provider].append(_time(sessions[provider], feeds))
            except FerryError as error:
                if provider == CPU:
                    raise
                failed[provider] = error.message
    return [Rating(provider, tuple(times), failed.get(provider, "")) for provider, times in seconds.items()]


def _time(session: OrtSession, feeds: Mapping[str, Array]) -> float:
    """Seconds of a run alone: to have it guarded takes longer than a small model does."""
    outputs = [spec.name for spec in session.outputs]
    with stopped_after(RUN_S_MAX, session.stop):
        started_at = time.perf_counter()
        session.run(feeds, outputs)
        return time.perf_counter() - started_at


def _run(session: OrtSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    with stopped_after(RUN_S_MAX, session.stop):
        return session.run(feeds, [spec.name for spec in session.outputs])
