"""What getting a release has cost: bytes over the network by download, against the order's budget.

One `Spending` belongs to one try. It starts with what lies on the disk and was never counted, because the program died
before it could tell, and ends in the `Tally` of the event that the try ends in.
"""

from collections.abc import Mapping

from common.ids import Digest
from common.wire import DesiredModel, Strategy
from edge_agent.fetch import OnProgress, Transfer
from edge_agent.update import Tally


class Spending:
    """`here` is how many bytes of each download are on the disk, `told` what earlier tries have told of."""

    def __init__(self, target: DesiredModel, told: Tally, here: Mapping[Digest, int]) -> None:
        self._budget = target.max_bytes
        self._told = told
        self._here = here
        self._untold = told.uncounted(here)
        self._tally = Tally()
        self._moved: dict[Digest, int] = {}

    @property
    def total(self) -> int:
        """Bytes that the update has moved so far, all tries together."""
        return self._told.bytes_transferred + sum(self._untold.values()) + sum(self._moved.values())

    @property
    def left(self) -> int | None:
        """Bytes that the order still allows; None: any number."""
        return None if self._budget is None else max(0, self._budget - self.total)

    def meter(self, name: Digest) -> OnProgress:
        """What to tell the progress of a download to."""

        def progress(moved: int, _total: int) -> None:
            self._moved[name] = moved

        return progress

    def finished(self, name: Digest, transfer: Transfer) -> None:
        """A download is complete. What was complete when an earlier try told of it is not told as resumed again."""
        news = transfer.bytes or name in self._untold
        resumed = transfer.resumed_bytes if news else 0
        self._tally = self._tally.plus(Tally(transport=transfer.transport, resumed_bytes=resumed))

    def tally(self, strategy: Strategy = "none") -> Tally:
        """What to tell now."""
        names = self._untold.keys() | self._moved.keys()
        downloads = {name: self._untold.get(name, 0) + self._moved.get(name, 0) for name in names}
        return self._tally.plus(Tally(strategy=strategy, downloads=downloads))
