"""A limit on the time of runs that no request waits for: a model or a step may loop for ever in its first run too.

Requests have the dispatcher for that (`edge_agent.inference.dispatch`).
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from common.artifact.tensors import Array
from edge_agent.inference.engine import Session

AGAIN_S = 1.0
"""Between two tries to stop what goes on."""


@contextlib.contextmanager
def stopped_after(seconds: float, stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` with this thread, again and again, once the block has taken `seconds`."""
    thread, over = threading.get_ident(), threading.Event()

    def oversee() -> None:
        pause_s = seconds
        while not over.wait(pause_s):
            stop(thread)
            pause_s = AGAIN_S

    threading.Thread(target=oversee, name="time-limit", daemon=True).start()
    try:
        yield
    finally:
        over.set()


class TimeLimited:
    """A session of which every run is stopped after `seconds`."""

    def __init__(self, session: Session, seconds: float) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self.stop, self.close = session.stop, session.close
        self._session = session
        self._seconds = seconds

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """See `Session.run`."""
        with stopped_after(self._seconds, self.stop):
            return self._session.run(feeds, outputs)
