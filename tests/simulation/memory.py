"""A transaction over dictionaries: the part of the store's port that rollouts and intake use, for simulated time.

The simulation runs the real intake, the real planner and the real commit on it, thousands of times a second. That the
real store behaves the same is shown by the store's contract suite and by the reconciler's integration tests.
"""

from collections.abc import Iterator, Sequence
from typing import cast

from common.artifact import ArtifactRef
from common.ids import DeviceId, Digest, ModelName, ReleaseRef
from controller.devices import Device
from controller.rollouts.model import TERMINAL_ROLLOUT_STATES, Execution, Rollout
from controller.store.port import Event, FileParts, FoundVariant, Order, Patch, Release, Transaction


class MemoryDevices:
    def __init__(self) -> None:
        self.rows: dict[DeviceId, Device] = {}

    def get(self, device: DeviceId) -> Device | None:
        return self.rows.get(device)

    def put(self, device: Device) -> None:
        self.rows[device.id] = device

    def all(self) -> Iterator[Device]:
        return iter(list(self.rows.values()))


class MemoryOrders:
    def __init__(self) -> None:
        self.rows: dict[DeviceId, Order] = {}

    def get(self, device: DeviceId) -> Order | None:
        return self.rows.get(device)

    def put(self, order: Order) -> None:
        before = self.rows.get(order.device)
        assert before is None or order.generation > before.generation, "generations never decrease"
        self.rows[order.device] = order


class MemoryReleases:
    def __init__(self) -> None:
        self.rows: dict[ReleaseRef, Release] = {}

    def get(self, ref: ReleaseRef) -> Release | None:
        return self.rows.get(ref)

    def page(self, after: tuple[str, str] | None, limit: int, model: ModelName | None = None) -> list[Release]:
        refs = sorted(ref for ref in self.rows if model in {None, ref.model})
        return [self.rows[ref] for ref in refs if after is None or (ref.model, ref.version) > after][:limit]


class MemoryPatches:
    def __init__(self) -> None:
        self.rows: dict[tuple[Digest, Digest, str], Patch] = {}

    def get(self, base: Digest, target: Digest, codec: str) -> Patch | None:
        return self.rows.get((base, target, codec))

    def put(self, patch: Patch) -> None:
        self.rows[patch.base, patch.target, patch.codec] = patch

    def for_target(self, target: Digest) -> list[Patch]:
        return [patch for patch in self.rows.values() if patch.target == target]


class MemoryArtifacts:
    def __init__(self) -> None:
        self.rows: dict[Digest, ArtifactRef] = {}

    def get(self, digest: Digest) -> ArtifactRef | None:
        return self.rows.get(digest)


class MemoryParts:
    def __init__(self) -> None:
        self.rows: dict[Digest, FileParts] = {}

    def get(self, file: Digest) -> FileParts | None:
        return self.rows.get(file)


class MemoryRollouts:
    def __init__(self) -> None:
        self.rows: dict[str, Rollout] = {}
        self.parts: dict[str, dict[DeviceId, Execution]] = {}

    def get(self, rollout: str) -> Rollout | None:
        return self.rows.get(rollout)

    def put(self, rollout: Rollout) -> None:
        self.rows[rollout.id] = rollout

    def active(self) -> list[Rollout]:
        return [rollout for rollout in self.rows.values() if rollout.state not in TERMINAL_ROLLOUT_STATES]

    def executions(self, rollout: str) -> list[Execution]:
        return list(self.parts.get(rollout, {}).values())

    def put_executions(self, rollout: str, executions: Sequence[Execution]) -> None:
        self.parts.setdefault(rollout, {}).update({one.device: one for one in executions})


class MemoryJournal:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def append_event(self, event: Event) -> int:
        self.events.append(event)
        return len(self.events)


class MemoryFindings:
    def __init__(self) -> None:
        self.rows: dict[tuple[Digest, DeviceId], FoundVariant] = {}

    def put(self, found: FoundVariant) -> None:
        key = found.artifact, found.device
        if found.failed or found.run_s is not None or key not in self.rows:
            self.rows[key] = found

    def of(self, artifact: Digest) -> list[FoundVariant]:
        found = [one for one in self.rows.values() if one.artifact == artifact]
        return sorted(found, key=lambda one: (one.device_class, one.device))


class MemoryTransaction:
    """See the port."""

    def __init__(self) -> None:
        self.devices = MemoryDevices()
        self.orders = MemoryOrders()
        self.releases = MemoryReleases()
        self.artifacts = MemoryArtifacts()
        self.patches = MemoryPatches()
        self.parts = MemoryParts()
        self.rollouts = MemoryRollouts()
        self.journal = MemoryJournal()
        self.findings = MemoryFindings()

    @property
    def view(self) -> Transaction:
        """As the type that units of work take; the ports that rollouts do not use are absent."""
        return cast(Transaction, self)
