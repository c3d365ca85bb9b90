"""The ways in for requests: coroutines, threads, futures, and callers who take their answer on any thread.

What they have in common is `edge_agent.inference.flow`; here a request to a model that is not in memory waits for it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from common.artifact.tensors import Array
from common.clock import Clock
from common.errors import FerryError, Unavailable
from common.ids import ModelName, Version
from edge_agent.inference.asleep import Asleep, Waking
from edge_agent.inference.engine import EngineFailure
from edge_agent.inference.flow import RequestFlow
from edge_agent.inference.requests import NO_TERMS, Ask, Inference, Terms, Waiter
from edge_agent.inference.scheduling import Ticket
from edge_agent.inference.turns import Turn


class Entrance:
    """Requests, from everywhere. All but `infer` may be called from any thread."""

    def __init__(self, flow: RequestFlow, waking: Waking, clock: Clock) -> None:
        self._flow = flow
        self._clock = clock
        self.waking = waking

    @property
    def finished(self) -> int:
        """A number that changes whenever a request has left its thread, however it went."""
        return self._flow.finished

    async def pulse(self) -> None:
        """Return when an inference thread has come back for work."""
        await asyncio.wrap_future(self._flow.pulse())

    @property
    def cores(self) -> int:
        """How many inferences run at one time."""
        return self._flow.cores

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return not self._flow.closed

    async def infer(
        self,
        model: ModelName,
        version: Version | None,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        terms: Terms = NO_TERMS,
    ) -> Inference:
        """The model's answer to `feeds` (input name to array of the declared type and shape).

        Without `version` the release in service answers, and during probation the previous one in its place if need
        be. `outputs` picks some outputs by name; None means all. The release's rules may hand a request without a
        version on to another model.

        Raises `NotFound` (model or version is not served), `BeingReplaced` (it will be in a moment), `InvalidInput`
        (names the tensor and what is expected), `Overloaded` and `DeadlineExceeded` (nothing was started),
        `EngineFailure` (the model raised).
        """
        ask = Ask(model, version, feeds, outputs, terms)
        try:
            return await self._flow.infer(ask)
        except Asleep:
            began = self._clock.monotonic()
            await self.waking.awake(model, terms.timeout_s)
        return await self._flow.infer(ask._replace(terms=terms.after(self._clock.monotonic() - began)))

    def infer_here(
        self,
        model: ModelName,
        version: Version | None,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        terms: Terms = NO_TERMS,
    ) -> Inference:
        """`infer` for callers without a loop, on any thread: when a core is free the caller's own thread runs it."""
        ask = Ask(model, version, feeds, outputs, terms)
        try:
            return self._flow.infer_here(ask)
        except Asleep:
            began = self._clock.monotonic()
            self.waking.awake_from_thread(model, terms.timeout_s)
        return self._flow.infer_here(ask._replace(terms=terms.after(self._clock.monotonic() - began)))

    def deliver(self, ask: Ask, caller: Waiter) -> Ticket | None:
        """`infer` for callers who take the outcome on any thread. It begins when what is returned is given to `serve`;
        None if that is not needed.
        """
        try:
            return self._flow.deliver(ask, caller)
        except Asleep:
            self._deliver_later(ask, caller)
            return None

    def serve(self, tickets: Sequence[Ticket], turn: Turn) -> None:
        """Begin with requests that came together: where a core is free, the calling thread runs them, and what else
        waits by then.
        """
        self._flow.serve(tickets, turn)

    def _deliver_later(self, ask: Ask, caller: Waiter) -> None:
        """For a model that must be loaded first."""
        pending: list[Future[Inference]] = []

        def cancel() -> bool:
            for one in pending:
                one.cancel()
            return False  # the end of `pending` is what answers

        def answered(future: "Future[Inference]") -> None:
            error = Unavailable("the caller has left") if future.cancelled() else future.exception()
            if error is None:
                caller.set_result(future.result())
            else:
                caller.set_exception(error if isinstance(error, FerryError) else EngineFailure(str(error)))

        caller.waits(cancel)
        pending.append(asyncio.run_coroutine_threadsafe(self.infer(*ask), self.waking.loop))
        pending[0].add_done_callback(answered)

    def submit(
        self,
        model: ModelName,
        version: Version | None,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        terms: Terms = NO_TERMS,
    ) -> "Future[Inference]":
        """`infer` for callers on other loops: never waits; a request whose future is cancelled in time is not run."""
        ask = Ask(model, version, feeds, outputs, terms)
        try:
            return self._flow.submit(ask)
        except Asleep:
            return asyncio.run_coroutine_threadsafe(self.infer(*ask), self.waking.loop)
