"""One request on its way through the server: what is asked, who answers, and where the answer goes."""

import asyncio
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, Final, NamedTuple, Protocol

from common.artifact.tensors import Array
from common.errors import FerryError, Unavailable
from common.ids import ModelName, Version
from edge_agent.inference.caching import Question
from edge_agent.inference.placement import Chosen
from edge_agent.inference.scheduling import PRIORITY_DEFAULT
from edge_agent.inference.sides import NO_WISH, Wish
from edge_agent.inference.tensors import bytes_of


class Terms(NamedTuple):
    """What a request says of itself.

    `priority` is 1 (first) to 9; a request that could not be started within `timeout_s` never is. `parameters` are what
    the rules of the release may ask of it beside its tensors. `wish` counts where requests are split.
    """

    priority: int = PRIORITY_DEFAULT
    timeout_s: float | None = None
    parameters: Mapping[str, Any] = {}
    wish: Wish = NO_WISH

    def after(self, waited_s: float) -> "Terms":
        """For a request that has waited for so many seconds already."""
        return self if self.timeout_s is None else self._replace(timeout_s=max(0.0, self.timeout_s - waited_s))


NO_TERMS: Final = Terms()


class Ask(NamedTuple):
    """What a caller wants: `outputs` of `model` (None: all of them) for `feeds`, from `version` if that is given."""

    model: ModelName
    version: Version | None
    feeds: Mapping[str, Array]
    outputs: Sequence[str] | None = None
    terms: Terms = NO_TERMS


class Overloaded(Unavailable):
    """Every core is busy and the queue is full; the request was not started."""

    code = "overloaded"


class Inference(NamedTuple):
    """An answer, and the release that gave it; `recalled` if it gave it before, to an equal request.

    Arrays of a release that keeps answers are read-only.
    """

    outputs: dict[str, Array]
    version: Version
    model: ModelName
    recalled: bool = False


class Caller(Protocol):
    """Who gets the one outcome of a request: a future of either kind, or what behaves like one."""

    def done(self) -> bool:
        """Whether nobody waits for it any more."""
        ...

    def set_result(self, result: Inference, /) -> None: ...

    def set_exception(self, exception: FerryError, /) -> None: ...


class Waiter(Caller, Protocol):
    """A caller who is told when the answer takes a while. It gets the outcome on any thread."""

    def waits(self, cancel: Callable[[], bool], /) -> None:
        """Before anybody else can answer; `cancel` takes the request back, and returns whether nobody will."""
        ...


class Here:
    """A caller who waits on a thread of its own; far cheaper than a future when the same thread has the answer too."""

    __slots__ = ("_answered", "_error", "_result")

    def __init__(self) -> None:
        self._result: Inference | None = None
        self._error: FerryError | None = None
        self._answered: threading.Lock | None = None

    def done(self) -> bool:
        return self._result is not None or self._error is not None

    def set_result(self, result: Inference) -> None:
        self._result = result
        if self._answered:
            self._answered.release()

    def set_exception(self, error: FerryError) -> None:
        self._error = error
        if self._answered:
            self._answered.release()

    def elsewhere(self) -> None:
        """The answer will come from another thread."""
        self._answered = threading.Lock()
        self._answered.acquire()

    def result(self) -> Inference:
        """The answer, when it is there; raises what came instead."""
        if self._answered:
            self._answered.acquire()
        if self._result is None:
            raise self._error or AssertionError("a request that ran has no outcome")
        return self._result


class Request:
    """A request that was admitted at `admitted_at` (monotonic seconds); `chosen` is pinned until it is done.

    `question` is what its answer is kept for; None if it is not. `compute_s` is how long the engine took for it, or for
    the batch that it was in.
    """

    __slots__ = ("admitted_at", "chosen", "compute_s", "feeds", "future", "kind", "outputs", "question", "rows")

    def __init__(
        self,
        chosen: Chosen,
        feeds: Mapping[str, Array],
        outputs: Sequence[str],
        admitted_at: float,
        future: "Caller | asyncio.Future[Inference] | Future[Inference]",
        *,
        question: Question | None = None,
    ) -> None:
        self.chosen = chosen
        self.feeds = question.feeds if question else feeds
        self.outputs = outputs
        self.admitted_at = admitted_at
        self.future = future
        self.question = question
        self.compute_s = 0.0
        batching = chosen.first.batching
        self.kind = batching.kind_of(feeds)
        self.rows = batching.rows_of(feeds)

    @property
    def size(self) -> int:
        """Bytes of its inputs."""
        return bytes_of(self.feeds.values())

    @property
    def key(self) -> Hashable | None:
        """What it has in common with requests that it may run with."""
        if self.rows is None:
            return None
        return id(self.chosen.first), id(self.chosen.second), self.kind.shape, tuple(self.outputs)

    def settle(self, outcome: Inference | FerryError) -> None:
        """Hand the outcome to the caller, on the thread that its future belongs to."""
        if self.future.done():
            return  # the caller has given up
        try:
            if isinstance(outcome, Inference):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)
        except InvalidStateError:
            return  # or does so now, on another thread
