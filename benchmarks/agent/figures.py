"""What a turn of a server in a round has shown, and medians over rounds. Pure."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Final, NamedTuple

from benchmarks.agent.load import Load

RAW_ONE: Final = "raw, one thread"
RAW_ALL: Final = "raw, a thread for each core"


class Turn(NamedTuple):
    """One server, on one model, with so many clients, in one round; `cpu_s` is the server's, or raw's own."""

    round: int
    model: str
    server: str
    clients: int
    load: Load
    cpu_s: float

    @property
    def cpu_ms(self) -> float:
        """CPU of the server for each request."""
        return self.cpu_s * 1e3 / max(1, self.load.answered)


class Turns:
    """All turns of a run."""

    def __init__(self, turns: Iterable[Turn]) -> None:
        self._by: dict[tuple[str, str, int], list[Turn]] = {}
        for turn in turns:
            self._by.setdefault((turn.model, turn.server, turn.clients), []).append(turn)

    def of(self, model: str, server: str, clients: int) -> Sequence[Turn]:
        """One for each round; none where it was not measured."""
        return self._by.get((model, server, clients), ())

    def keys(self) -> list[tuple[str, str, int]]:
        """(model, server, clients) in the order in which they were first measured."""
        return list(self._by)

    def middle(self, model: str, server: str, clients: int, of: Callable[[Turn], float]) -> float:
        """The median over rounds."""
        return median(of(turn) for turn in self.of(model, server, clients))

    def against(
        self,
        model: str,
        one: tuple[str, int],
        other: tuple[str, int],
        compare: Callable[[Turn, Turn], float],
    ) -> float:
        """The median over rounds of `compare`, for two (server, clients) of the same round: a slow moment hits both."""
        pairs = zip(self.of(model, *one), self.of(model, *other), strict=True)
        return median(compare(first, second) for first, second in pairs)

    def failed(self) -> int:
        """Requests that were not answered well, in all turns."""
        return sum(turn.load.failed for turns in self._by.values() for turn in turns)
