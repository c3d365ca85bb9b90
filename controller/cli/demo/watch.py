"""Every finished update of the fleet, collected from the controller's event stream while the story goes on.

A device's report holds only its last update, and a rollback replaces a failure by a success; the events keep them all.
"""

import threading
import time

import msgspec

from common.errors import Unavailable
from common.ids import DeviceId, ReleaseRef
from common.wire import UpdateReport
from controller.cli.demo.figures import Update
from controller.cli.demo.fleet import Endpoint
from controller.client import FerryClient

KIND = "update.finished"
RECONNECT_S = 0.5
REPORTS_TIMEOUT_S = 30.0
POLL_S = 0.05


class UpdateWatch:
    """A thread that reads events and keeps those that end an update."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._client = FerryClient(endpoint.url, endpoint.token)
        self._updates: list[tuple[ReleaseRef, Update]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="update-watch", daemon=True)

    def start(self) -> None:
        """Begin with the oldest event that the controller keeps."""
        self._thread.start()

    def stop(self) -> None:
        """Read no more; the thread ends with the connection."""
        self._stopped.set()

    def all(self) -> list[Update]:
        """All updates so far, oldest first."""
        return [update for _, update in self._updates]

    def of(self, release: ReleaseRef) -> list[Update]:
        """The updates to `release`, oldest first."""
        return [update for ref, update in self._updates if ref == release]

    def latest(self, device: DeviceId) -> Update:
        """The device's last update."""
        return next(update for update in reversed(self.all()) if update.device == device)

    def wait_for(self, release: ReleaseRef, count: int) -> list[Update]:
        """The updates to `release` once there are `count`; events may come a moment after what they speak of."""
        deadline = time.monotonic() + REPORTS_TIMEOUT_S
        while len(self.of(release)) < count:
            if time.monotonic() > deadline:
                raise Unavailable(f"{len(self.of(release))} of {count} devices reported their update to {release}")
            time.sleep(POLL_S)
        return self.of(release)

    def _run(self) -> None:
        last = 0
        while not self._stopped.is_set():
            try:
                for event in self._client.events(kind=KIND, after=last):
                    last = event.seq
                    report = msgspec.convert(event.data, type=UpdateReport)
                    release = ReleaseRef.parse(str(event.data["release"]))
                    self._updates.append((release, Update(DeviceId(event.subject), report)))
            except Unavailable:
                self._stopped.wait(RECONNECT_S)
