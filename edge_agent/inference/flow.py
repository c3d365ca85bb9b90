"""How requests come in and their answers go out: at once where a core is free, else through the queue, in batches.

What arrives in one turn of the event loop goes to the dispatcher's threads together, so that callers who compete form
batches. No request runs on the loop itself, however short it has been so far: a model that hangs on one input would
take the whole agent with it. A caller with a thread of its own runs its request there when a core is free, and saves
the way to another thread and back.
"""

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Final, NamedTuple

from common.clock import Clock
from common.errors import DeadlineExceeded, Unavailable
from common.ids import ModelName
from edge_agent.inference.answering import Answer, Answering
from edge_agent.inference.batching import TRIAL_ROWS_MAX
from edge_agent.inference.dispatch import Dispatcher
from edge_agent.inference.engine import EngineFailure
from edge_agent.inference.mirror import Mirror
from edge_agent.inference.placement import Placements
from edge_agent.inference.requests import Ask, Caller, Here, Inference, Overloaded, Request, Terms, Waiter
from edge_agent.inference.router import Router
from edge_agent.inference.routing import Load
from edge_agent.inference.scheduling import PRIORITY_DEFAULT, Ticket, Usual, WaitingLimits
from edge_agent.inference.tensors import check_outputs
from edge_agent.inference.turns import Turn

logger = logging.getLogger(__name__)


ANSWERING: Final = "answering"
SHORT: Final = 5.0
"""Requests are short if running and answering them takes at most so many times as long as answering them alone does:
then the engine takes about as long as reading and answering.
"""


class FlowLimits(NamedTuple):
    """What may wait, and how long the engine may take for one request or batch before it is stopped."""

    waiting: WaitingLimits = WaitingLimits()
    run_s_max: float = 60.0


class RequestFlow:
    """Takes requests to `placements` through `answering` and back, `cores` at one time. `wake` asks for a model that a
    rule names and that is not in memory.
    """

    def __init__(
        self,
        placements: Placements,
        answering: Answering,
        clock: Clock,
        cores: int,
        limits: FlowLimits,
        *,
        wake: Callable[[ModelName], None],
    ) -> None:
        self._placements = placements
        self._recall = answering.recall
        self._answering = answering
        self._clock = clock
        self._dispatcher = Dispatcher(cores, limits.waiting, limits.run_s_max, self, clock)
        self.router = Router(placements, self._load, wake)
        self.cores = cores
        self._batch_bytes_max = limits.waiting.batch_bytes_max
        self._arrived: list[Ticket] = []
        self.mirrors: dict[ModelName, Mirror] = {}
        self._loop_thread = 0
        self.closed = False
        self.finished = 0
        self._answers = Usual()

    def refuse_new(self) -> None:
        """From now on `Unavailable`."""
        self.closed = True

    def close(self) -> None:
        """Answer what was accepted and end the threads. Returns at once."""
        self._dispatcher.close()

    async def infer(self, ask: Ask) -> Inference:
        """See `ModelServer.infer`."""
        loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        future: asyncio.Future[Inference] = loop.create_future()
        request = self._request(ask, future)
        if (known := self._recalled(request)) is not None:
            return known
        ticket = _ticket(request, ask.terms)
        self._arrived.append(ticket)
        if len(self._arrived) == 1:
            loop.call_soon(self._flush)
        try:
            return await future
        except asyncio.CancelledError:
            self._cancel(ticket)
            raise

    def infer_here(self, ask: Ask) -> Inference:
        """See `ModelServer.infer_here`."""
        caller = Here()
        request = self._request(ask, caller)
        if (known := self._recalled(request)) is not None:
            return known
        if not self._dispatcher.try_run(request):
            caller.elsewhere()
            self._dispatcher.submit([_ticket(request, ask.terms)])
        return caller.result()

    def deliver(self, ask: Ask, caller: Waiter) -> Ticket | None:
        """See `ModelServer.deliver`."""
        request = self._request(ask, caller)
        if (known := self._recalled(request)) is None:
            return _ticket(request, ask.terms)
        caller.set_result(known)
        return None

    def serve(self, tickets: Sequence[Ticket], turn: Turn) -> None:
        """See `ModelServer.serve`."""
        if len(tickets) == 1 and self._dispatcher.run_on(tickets[0].work, turn):
            return
        for ticket in tickets:
            ticket.work.future.waits(partial(self._cancel, ticket))
        self._dispatcher.serve(tickets, turn)

    def submit(self, ask: Ask) -> "Future[Inference]":
        """See `ModelServer.submit`."""
        future: Future[Inference] = Future()
        request = self._request(ask, future)
        if (known := self._recalled(request)) is not None:
            future.set_result(known)
            return future
        ticket = _ticket(request, ask.terms)

        def ended(_: object) -> None:
            if future.cancelled():
                self._cancel(ticket)

        future.add_done_callback(ended)
        self._dispatcher.submit([ticket])
        return future

    def pulse(self) -> "Future[None]":
        """Done when a thread has come back for work."""
        return self._dispatcher.pulse()

    def rows_for(self, first: Ticket, waiting: int) -> int:
        """See `Owner.rows_for`."""
        request: Request = first.work
        row = first.size // max(1, first.rows)
        return request.chosen.first.batching.next_rows(request.kind, waiting, row, self._batch_bytes_max)

    def is_short(self, works: Sequence[Request]) -> bool:
        """See `Owner.is_short`."""
        usual_s, answering_s = works[0].chosen.first.usual.of(_cost_key(works)), self._answers.of(ANSWERING)
        return usual_s is not None and answering_s is not None and usual_s <= SHORT * answering_s * len(works)

    def took(self, works: Sequence[Request], seconds: float) -> None:
        """See `Owner.took`."""
        works[0].chosen.first.usual.learn(_cost_key(works), seconds)
        if len(works) == 1:
            self._answers.learn(ANSWERING, seconds - works[0].compute_s)

    def run(self, works: Sequence[Request]) -> None:
        """See `Owner.run`."""
        try:
            self._run(works)
        except Exception:
            logger.exception("a batch failed outside the engine")
            failure = EngineFailure("internal error; the agent's log has the details")
            self._deliver([Answer(request, failure) for request in works])
        finally:
            for request in works:
                request.chosen.unpin()

    def stop(self, thread: int, works: Sequence[Request]) -> None:
        """See `Owner.stop`."""
        for request in works:
            first, second = request.chosen
            first.stop(thread)
            if second:
                second.stop(thread)

    def refuse(self, ticket: Ticket, *, late: bool) -> None:
        """See `Owner.refuse`."""
        request: Request = ticket.work
        self._answering.not_run(request, "expired" if late else "refused")
        request.chosen.unpin()
        self._deliver([Answer(request, _too_late() if late else _no_room())])

    def _cancel(self, ticket: Ticket) -> bool:
        """The caller has left; if the request still waited, it will not run, and that is the answer."""
        cancelled = self._dispatcher.cancel(ticket)
        if cancelled:
            self._answering.not_run(ticket.work, "cancelled")
            ticket.work.chosen.unpin()
        return cancelled

    def _run(self, requests: Sequence[Request]) -> None:
        if len(requests) == 1:
            answer = self._alone(requests[0])
            if self.mirrors:
                self._offer([answer])
            if isinstance(answer.request.future, asyncio.Future):
                self._deliver([answer])
            else:
                answer.request.settle(answer.outcome)
            return
        batching = requests[0].chosen.first.batching
        mixed = len({request.kind.length for request in requests}) > 1
        settled = batching.proven and (batching.lengths.trusted(requests[0].outputs) if mixed else True)
        groups = _by_length(requests) if mixed and not settled else [requests]
        answers = [answer for group in groups for answer in self._answered(group, together=batching.proven)]
        if not settled:
            self._answering.try_together(_some(answers))

    def _answered(self, requests: Sequence[Request], *, together: bool) -> list[Answer]:
        """The answers, which are delivered."""
        answers = self._answering.together(requests) if len(requests) > 1 and together else None
        if answers is None:
            answers = [self._alone(request) for request in requests]
        if self.mirrors:
            self._offer(answers)
        self._deliver(answers)
        return answers

    def _offer(self, answers: Sequence[Answer]) -> None:
        """Let a candidate look at what was asked and answered."""
        for request, outcome in answers:
            if mirror := self.mirrors.get(request.chosen.first.model):
                mirror.offer(request, outcome)

    @property
    def free(self) -> bool:
        """See `Dispatcher.free`."""
        return self._dispatcher.free

    def _alone(self, request: Request) -> Answer:
        answer = self._answering.alone(request)
        self.finished += 1  # threads may overwrite each other's, and it still changes
        return answer

    def _request(self, ask: Ask, future: "Caller | asyncio.Future[Inference] | Future[Inference]") -> Request:
        """A request that may run; whoever called sees to its end."""
        if self.closed:
            raise Unavailable("the inference server is stopping")
        admitted_at = self._clock.monotonic()
        model, version, feeds, outputs, terms = ask
        chosen = self._placements.pin(model, version, terms.wish)
        try:
            first = chosen.first
            first.expected.check(feeds)
            if outputs is None:
                outputs = first.output_names
            else:
                check_outputs(first.outputs, outputs)
            if version is None and first.serving.routes:
                chosen = self.router.handed_on(chosen, feeds, terms.priority or PRIORITY_DEFAULT, terms.parameters)
            question = self._recall.question(chosen.first, feeds, outputs)
            return Request(chosen, feeds, outputs, admitted_at, future, question=question)
        except BaseException:
            chosen.unpin()
            raise

    def _load(self) -> Load:
        """How busy the device is; what has arrived in this turn of the loop waits too, if no core is free for it."""
        busy = self._dispatcher.busy
        arrived = max(0, len(self._arrived) - (self.cores - busy))
        return Load(self._dispatcher.waiting + arrived, busy, self.cores)

    def _recalled(self, request: Request) -> Inference | None:
        """The answer, if the release gave it before; the request is done then."""
        loaded, question = request.chosen.first, request.question
        outputs = self._recall.find(loaded, question, request.admitted_at) if question else None
        if outputs is None:
            return None
        request.chosen.unpin()
        return Inference(outputs, loaded.version, loaded.model, recalled=True)

    def _flush(self) -> None:
        """Start what has arrived in this turn of the loop."""
        arrived, self._arrived = self._arrived, []
        self._dispatcher.submit(arrived)

    def _deliver(self, answers: Sequence[Answer]) -> None:
        """Hand outcomes to their callers, those on the loop all at once."""
        later = []
        here = threading.get_ident() == self._loop_thread
        for answer in answers:
            if isinstance(answer.request.future, asyncio.Future) and not here:
                later.append(answer)
            else:
                answer.request.settle(answer.outcome)
        if later:
            later[0].request.future.get_loop().call_soon_threadsafe(_settle, later)  # type: ignore[union-attr]


def _ticket(request: Request, terms: Terms) -> Ticket:
    deadline = None if terms.timeout_s is None else request.admitted_at + terms.timeout_s
    return Ticket(
        request,
        key=request.key,
        rows=request.rows or 1,
        size=request.size,
        length=request.kind.length,
        priority=terms.priority,
        deadline=deadline,
    )


def _cost_key(works: Sequence[Request]) -> Hashable:
    return works[0].kind, sum([work.rows or 1 for work in works])


def _some(answers: Sequence[Answer]) -> Sequence[Answer]:
    """Enough for a trial, the first and the last among them, which are the shortest and the longest."""
    return answers if len(answers) <= TRIAL_ROWS_MAX else [*answers[: TRIAL_ROWS_MAX - 1], answers[-1]]


def _by_length(requests: Sequence[Request]) -> list[list[Request]]:
    """Those of equal length together, the shortest first."""
    ordered = sorted(requests, key=_length)
    return [list(group) for _, group in itertools.groupby(ordered, _length)]


def _length(request: Request) -> int:
    return request.kind.length


def _settle(answers: Sequence[Answer]) -> None:
    for request, outcome in answers:
        request.settle(outcome)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the request waited until its time was up", fix="allow more time, or send less")


def _no_room() -> Overloaded:
    return Overloaded("all cores are busy and the queue is full", fix="try again a little later")
