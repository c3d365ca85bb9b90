"""One request on its way through the server: what is asked, who answers, and where the answer goes."""

import asyncio
import contextlib
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import NamedTuple

from common.artifact.tensors import Array
from common.errors import FerryError, Unavailable
from common.ids import ModelName, Version
from edge_agent.inference.batching import Kind
from edge_agent.inference.caching import Question
from edge_agent.inference.placement import Chosen
from edge_agent.inference.tensors import bytes_of

Deadline = float | None
"""Monotonic seconds, or None."""


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
        future: "asyncio.Future[Inference] | Future[Inference]",
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
        self.kind = Kind(batching.shape_of(feeds), batching.length_of(feeds))
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
        with contextlib.suppress(InvalidStateError):  # or does so now, on another thread
            if isinstance(outcome, Inference):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)
